"""Peers in the Trainer of transformers: two small text classifiers learn from each other with dml."""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import codistill as cd
from codistill.integrations import PeerTrainer

torch.manual_seed(0)
NUM_WORDS = 15


class Sentences(Dataset):
    """Random sentences of 8 words; words 0 to 3 are positive, 4 to 7 negative, and one of these is in each."""

    def __init__(self, count: int) -> None:
        self.labels = torch.randint(2, (count,))
        self.tokens = torch.randint(8, NUM_WORDS, (count, 8))
        judging = torch.randint(4, (count,)) + 4 * (1 - self.labels)
        self.tokens[torch.arange(count), torch.randint(8, (count,))] = judging

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def network() -> BertForSequenceClassification:
    """Return a small network with new weights."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=NUM_WORDS, num_labels=2, **size))


train, test = Sentences(4000), Sentences(500)
peers = cd.NetworkPeers(network, num_peers=2, num_classes=2, example={"input_ids": train.tokens[:1]})
trainer = PeerTrainer(
    peers,
    cd.methods.DML(2, update="joint"),
    TrainingArguments(
        "runs/text", num_train_epochs=2, per_device_train_batch_size=32, learning_rate=1e-3, report_to=[]
    ),
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=lambda p: {"accuracy": 100 * (p.predictions.argmax(1) == p.label_ids).mean()},
)
trainer.train()
print(f"accuracy of the deployed member on 500 new sentences: {trainer.evaluate()['eval_accuracy']:.1f} %")
student = trainer.student()  # a BertForSequenceClassification
student.save_pretrained("student")
