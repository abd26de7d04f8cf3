"""The part of `student.py` that loads an exported network; it stands behind the network's own source."""

LOADER = '''

# ----------------------------------------------------------------------------------------------------------------------
# The trained student: `model, about = load("{weights}")`, then
# `about["classes"][model(normalise(pixels, about)).argmax(-1)]`.


def load(path: str = "{weights}") -> tuple[nn.Module, dict]:
    """Return the trained network, in evaluation mode, and what its file says of it (classes, mean, std, size)."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        data = bytearray(stream.read())
    about = {{key: json.loads(value) for key, value in header.pop("__metadata__").items()}}
    kinds = {{"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}}
    tensors = {{}}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = kinds[entry["dtype"]]
        flat = torch.frombuffer(data[begin:end], dtype=kind) if end > begin else torch.empty(0, dtype=kind)
        tensors[name] = flat.reshape(entry["shape"])
    model = {builder}(num_classes=len(about["classes"]), in_channels=about["channels"])
    model.load_state_dict(tensors)
    return model.eval(), about


def normalise(pixels: Tensor, about: dict) -> Tensor:
    """Turn uint8 pixels, `B x C x H x W`, into what the network was trained on."""
    mean = torch.tensor(about["mean"]).view(-1, 1, 1)
    std = torch.tensor(about["std"]).view(-1, 1, 1)
    return (pixels.float() / 255 - mean) / std
'''
