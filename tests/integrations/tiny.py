"""Tiny transformers and data for the tests of the integrations."""

from __future__ import annotations

import torch
import transformers
from transformers import TrainingArguments

VOCABULARY = 31


def bert(labels=2, layers=1):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def gpt2(layers=1, width=8, heads=2, vocabulary=VOCABULARY, positions=16):
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config)


def classified(records):
    """Sequences of different lengths with a label."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(1, VOCABULARY, (3 + i % 4,), generator=generator) for i in range(records)]
    return [{"input_ids": row, "labels": int(i % 2)} for i, row in enumerate(rows)]


def sequences(records):
    """Sequences of different lengths, to be predicted token by token."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in classified(records)]


def pad(records):
    """Collates with padding, as the collators of transformers do."""

    def stack(name, value):
        return torch.nn.utils.rnn.pad_sequence([r[name] for r in records], batch_first=True, padding_value=value)

    batch = {"input_ids": stack("input_ids", 0)}
    lengths = torch.tensor([len(r["input_ids"]) for r in records])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    whole = isinstance(records[0]["labels"], int)
    batch["labels"] = torch.tensor([r["labels"] for r in records]) if whole else stack("labels", -100)
    return batch


def arguments(path, **options):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    return TrainingArguments(str(path), **{**settings, **options})
