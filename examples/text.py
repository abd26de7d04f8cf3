"""A text classifier of transformers, built from a small config: two of them learn from each other with dml."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import codistill as cd

torch.manual_seed(0)
WORDS = ["good", "great", "fine", "nice", "bad", "poor", "awful", "sad", "the", "film", "was", "very", "and", "it", "a"]


def sentences(count: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return token ids of random sentences with a mask, and whether the one word that judges is positive."""
    labels = torch.randint(2, (count,))
    tokens = torch.randint(8, len(WORDS), (count, 8))
    judging = torch.randint(4, (count,)) + 4 * (1 - labels)  # words 0 to 3 are positive, 4 to 7 negative
    tokens[torch.arange(count), torch.randint(8, (count,))] = judging
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels


def network() -> BertForSequenceClassification:
    """Return a small network with new weights."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), num_labels=2, **size))


peers = cd.NetworkPeers(network, num_peers=2, num_classes=2, example=sentences(2)[0])
method = cd.methods.DML(2, update="joint")
optimizer = torch.optim.AdamW(peers.parameters(), lr=0.001)
for _ in range(150):
    inputs, labels = sentences(32)
    terms = method(peers(inputs), labels)
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()

student = method.deploy(peers)  # a BertForSequenceClassification, to be saved with save_pretrained
inputs, labels = sentences(500)
with torch.no_grad():
    accuracy = (student(**inputs).logits.argmax(1) == labels).float().mean()
print(f"accuracy on 500 new sentences: {100 * accuracy:.1f} %")
