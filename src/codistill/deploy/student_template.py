"""The part of the exported Python file that loads the network; it follows the network's own source."""

LOADER = '''

# ----------------------------------------------------------------------------------------------------------------------
# The trained student: `model, metadata = load({weights!r})`, then
# `metadata["classes"][model(normalize(pixels, metadata)).argmax(-1)]`; the calibrated probabilities are
# `(model(normalize(pixels, metadata)) / metadata["temperature"]).softmax(-1)`.


def load(path: str = {weights!r}) -> tuple[nn.Module, dict]:
    """Return the trained network in evaluation mode, and the file's metadata (classes, mean, std, image size)."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        data = bytearray(stream.read())
    metadata = json.loads(header.pop("__metadata__")["codistill"])
    dtypes = {{"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}}
    tensors = {{}}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = dtypes[entry["dtype"]]
        flat = torch.frombuffer(data[begin:end], dtype=dtype) if end > begin else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry["shape"])
    model = {builder}(num_classes=len(metadata["classes"]), in_channels=metadata["channels"])
    model.load_state_dict(tensors)
    return model.eval(), metadata


def normalize(pixels: Tensor, metadata: dict) -> Tensor:
    """Turn uint8 pixels, `B x C x H x W`, into the network's input."""
    mean = torch.tensor(metadata["mean"]).view(-1, 1, 1)
    std = torch.tensor(metadata["std"]).view(-1, 1, 1)
    return (pixels.float() / 255 - mean) / std


normalise = normalize  # the name in earlier exports
'''
