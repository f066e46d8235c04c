"""Text as people write it: tokens, scripts and languages."""
