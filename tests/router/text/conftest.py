import pytest
from scripted_service import CORPUS, SPECIAL_TOKENS, byte_level_backend
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers

from kvrelay_router.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level():
    return Tokenizer(byte_level_backend())


@pytest.fixture(scope="session")
def byte_fallback():
    """The shape of Llama 2's and Mistral's tokenizers: words after ▁, bytes for what is unknown."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *SPECIAL_TOKENS, *bytes_],
        # Fixed: ties among rare characters are broken differently in every run.
        initial_alphabet=[*"▁abcdefghijklmnopqrstuvwxyz.,"],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS] * 4, trainer)
    # The trainer makes them special; in real tokenizers byte tokens are ordinary vocabulary.
    import json

    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer(Backend.from_str(json.dumps(raw)))


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request):
    return request.getfixturevalue(request.param)
