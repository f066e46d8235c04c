"""sentence-transformers as a reward: texts and cached references in, cosines out."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.protocol import Channel, torch_device_peak, torch_setup


def main() -> None:
    channel = Channel()
    spec = channel.spec
    torch, dtype, device = torch_setup(spec)
    import numpy as np
    from sentence_transformers import SentenceTransformer

    work = spec["work"]
    model = SentenceTransformer(spec["folder"], device=device, model_kwargs={"dtype": dtype})
    texts, references = spec["texts"], spec["references"]

    def embed(texts: list[str]) -> np.ndarray:
        return model.encode(
            texts,
            batch_size=work["batch_size"],
            normalize_embeddings=True,
            show_progress_bar=False,
        ).astype(np.float32)

    anchors = np.repeat(embed(references), work["generations"], axis=0)

    def run(_: int) -> dict[str, Any]:
        cosines = np.einsum("nd,nd->n", embed(texts), anchors)
        return {"texts": len(texts), "mean_cosine": float(cosines.mean())}

    check = float(np.einsum("nd,nd->n", embed(texts[:64]), anchors[:64]).mean())
    channel.ready(("torch", "transformers", "sentence-transformers"), check=check)
    channel.serve(run)
    channel.end(device_peak=torch_device_peak(torch, device))


if __name__ == "__main__":
    main()
