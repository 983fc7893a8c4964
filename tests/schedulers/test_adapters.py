import copy
import io
import math

import numpy
import pytest
import torch

from powertrain.schedulers import WSD, Constant, Cosine, Decay, Power
from powertrain.schedulers.adapters import WSDLR, ConstantLR, CosineLR, PowerLR

BATCH = 8192  # tokens of a step: beta = 2
DECAY = Decay(start=10 * BATCH, tokens=5 * BATCH + 3)
POWER = dict(a=0.1, max_lr=0.004, warmup_tokens=3 * BATCH + 1, decay=DECAY)
ADAPTERS = [
    (PowerLR, Power, POWER),
    (PowerLR, Power, {**POWER, "cap": "smooth"}),
    (WSDLR, WSD, dict(lr=0.003, warmup_tokens=3 * BATCH + 1, decay=DECAY)),
    (CosineLR, Cosine, dict(lr=0.003, warmup_tokens=3 * BATCH + 1, total_tokens=15 * BATCH)),
    (ConstantLR, Constant, dict(lr=0.003, warmup_tokens=3 * BATCH + 1)),
]


def make_optimizer(*multipliers, cls=torch.optim.SGD):
    return cls([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": m} for m in multipliers or (1.0,)])


def advance(optimizer, scheduler):
    """One training step; returns its learning rate."""
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    return rate


@pytest.mark.parametrize("tokens_seen", [0, 5_000])
@pytest.mark.parametrize("adapter, schedule, fields", ADAPTERS)
def test_every_step_has_the_pure_functions_rate(adapter, schedule, fields, tokens_seen):
    optimizer = make_optimizer()
    scheduler = adapter(optimizer, batch_tokens=BATCH, tokens_seen=tokens_seen, **fields)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    pure = schedule(**fields)
    expected = [pure(tokens=tokens_seen + k * BATCH, batch=2.0) for k in range(18)]
    assert [advance(optimizer, scheduler) for _ in range(18)] == expected
    assert scheduler.tokens == tokens_seen + 18 * BATCH
    assert len(set(expected)) >= 4


def test_power_fields_reach_the_schedule_and_a_decay_may_be_a_mapping():
    mapping = dict(start=10 * BATCH, tokens=5 * BATCH + 3)
    scheduler = PowerLR(make_optimizer(), batch_tokens=BATCH, **{**POWER, "decay": mapping})
    assert scheduler.schedule == Power(**POWER)
    with pytest.raises(ValueError, match="Did you mean 'max_lr'"):
        PowerLR(make_optimizer(), batch_tokens=BATCH, max_rl=0.1)


@pytest.mark.parametrize(
    "adapter, fields, length",
    [
        (PowerLR, dict(warmup_tokens=0), "decay"),
        (WSDLR, dict(lr=0.003, warmup_tokens=0), "decay"),
        (CosineLR, dict(lr=0.003, warmup_tokens=10 * BATCH, floor=0.0), "total_tokens"),
    ],
)
def test_a_decay_in_which_no_step_begins_is_refused(adapter, fields, length):
    def make(tokens, batch_tokens=BATCH, tokens_seen=0):
        value = Decay(start=10 * BATCH, tokens=tokens) if length == "decay" else 10 * BATCH + tokens
        fields_now = {**fields, length: value}
        return adapter(make_optimizer(), batch_tokens=batch_tokens, tokens_seen=tokens_seen, **fields_now)

    with pytest.raises(ValueError, match="from 81,920 tokens on takes 8,192, and no step of 8,192 begins in it"):
        make(BATCH)
    scheduler = make(BATCH + 1)
    with pytest.raises(ValueError, match="no step of 16,384 begins in it"):
        scheduler.set_batch_tokens(2 * BATCH)
    assert scheduler.batch_tokens == BATCH
    rates = [advance(scheduler.optimizer, scheduler) for _ in range(12)]
    assert 0 < rates[11] < 1e-3 * rates[10]  # one token before the end of it
    make(BATCH, tokens_seen=11 * BATCH)  # it is over
    make(BATCH - 1, tokens_seen=BATCH // 2)  # half a step after its start one begins


def test_a_groups_lr_multiplies_the_rate():
    optimizer = make_optimizer(1.0, 0.25)
    scheduler = PowerLR(optimizer, batch_tokens=BATCH, **POWER)
    for k in range(18):
        rate = Power(**POWER)(tokens=k * BATCH, batch=2.0)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, 0.25 * rate]
        assert scheduler.get_last_lr() == [rate, 0.25 * rate]
        advance(optimizer, scheduler)


def test_an_lr_in_a_tensor_is_written_in_place():
    optimizer = make_optimizer(torch.tensor(0.5, dtype=torch.float64))
    held = optimizer.param_groups[0]["lr"]
    scheduler = PowerLR(optimizer, batch_tokens=BATCH, **POWER)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert held.item() == 0.5 * Power(**POWER)(tokens=5 * BATCH, batch=2.0)
    scheduler.set_batch_tokens(2 * BATCH)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.5 * Power(**POWER)(tokens=5 * BATCH, batch=4.0)
    assert all(type(value) is float for value in scheduler.state_dict()["base_lrs"])


@pytest.mark.parametrize("cap", ["hard", "smooth"])
def test_both_caps_by_hand_under_a_batch_that_grows(cap):
    # η_max 0.004 and β · 0.1 · n^-0.5: the critical batch is 0.04 · √n, and 16 is above it to 160,000 tokens.
    law = dict(a=0.1, b=-0.5, max_lr=0.004, warmup_tokens=0, cap=cap)
    scheduler = PowerLR(make_optimizer(1.0, 0.25), batch_tokens=BATCH, **law)
    above = []
    for k in range(12):
        if k == 6:
            scheduler.set_batch_tokens(8 * BATCH)
        n, beta = scheduler.tokens, scheduler.batch_tokens / 4096
        uncapped = beta * 0.1 / math.sqrt(n) if n else math.inf
        rate = min(0.004, uncapped) if cap == "hard" else 1 / (1 / 0.004 + (1 / uncapped if n else 0))
        assert scheduler.get_last_lr() == pytest.approx([rate, 0.25 * rate], rel=1e-12)
        above.append(scheduler.schedule.at_cap(n, beta))
        assert above[k] == (beta > 0.04 * math.sqrt(n))
        scheduler.optimizer.step()
        scheduler.step()
    assert above == [True] + 5 * [False] + 2 * [True] + 4 * [False]
    saved = scheduler.state_dict()
    again = PowerLR(make_optimizer(1.0, 0.25), batch_tokens=BATCH, **law)
    again.load_state_dict(saved)
    assert again.get_last_lr() == scheduler.get_last_lr()


def ramp(optimizer, scheduler, steps, first=0):
    """Learning rates of a run whose batch grows at steps 4 and 9."""
    rates = []
    for k in range(first, steps):
        if k in (4, 9):
            scheduler.set_batch_tokens(BATCH * {4: 2, 9: 3}[k])
        rates.append(advance(optimizer, scheduler))
    return rates


def test_a_batch_that_grows_in_mid_run():
    optimizer = make_optimizer()
    scheduler = PowerLR(optimizer, batch_tokens=BATCH, **POWER)
    rates = ramp(optimizer, scheduler, 14)
    tokens, pure = 0, Power(**POWER)
    for k, rate in enumerate(rates):
        factor = 1 if k < 4 else 2 if k < 9 else 3
        assert rate == pure(tokens=tokens, batch=2.0 * factor)
        tokens += factor * BATCH
    assert scheduler.tokens == tokens == (4 + 2 * 5 + 3 * 5) * BATCH


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 9, 12])
@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "scheduler only"])
def test_resume_gives_the_rates_of_an_uninterrupted_run(stop, order):
    def make():
        optimizer = make_optimizer(1.0, 0.5)
        return optimizer, PowerLR(optimizer, batch_tokens=BATCH, tokens_seen=100, **POWER)

    whole = ramp(*make(), 16)
    optimizer, scheduler = make()
    assert ramp(optimizer, scheduler, stop) == whole[:stop]
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    optimizer_state, state = torch.load(buffer, weights_only=True)

    optimizer, scheduler = make()
    if order == "optimizer first":
        optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(state)
    if order == "scheduler first":
        optimizer.load_state_dict(optimizer_state)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert optimizer.param_groups[1]["lr"] == 0.5 * optimizer.param_groups[0]["lr"]
    assert ramp(optimizer, scheduler, 16, first=stop) == whole[stop:]


def test_the_state_is_plain_numbers_without_the_schedule():
    scheduler = PowerLR(make_optimizer(1.0, 0.5), batch_tokens=BATCH, tokens_seen=7, **POWER)
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler.state_dict() == {
        "tokens": 7 + BATCH,
        "batch_tokens": BATCH,
        "last_epoch": 1,
        "_step_count": 2,
        "base_lrs": [1.0, 0.5],
    }


def test_a_decay_added_on_resume_is_followed():
    trunk = {**POWER, "decay": None}
    optimizer = make_optimizer()
    scheduler = PowerLR(optimizer, batch_tokens=BATCH, **trunk)
    for _ in range(12):
        advance(optimizer, scheduler)
    state = copy.deepcopy(scheduler.state_dict())
    resumed = PowerLR(make_optimizer(), batch_tokens=BATCH, **POWER)
    resumed.load_state_dict(state)
    rate = Power(**POWER)(tokens=12 * BATCH, batch=2.0)
    assert resumed.get_last_lr() == [rate]
    assert rate < 0.7 * scheduler.get_last_lr()[0]


def test_last_epoch_is_the_last_step_done():
    optimizer = make_optimizer()
    PowerLR(optimizer, batch_tokens=BATCH, **POWER)
    scheduler = PowerLR(optimizer, batch_tokens=BATCH, tokens_seen=50, last_epoch=5, **POWER)
    assert (scheduler.last_epoch, scheduler.tokens) == (6, 50 + 6 * BATCH)
    assert optimizer.param_groups[0]["lr"] == Power(**POWER)(tokens=50 + 6 * BATCH, batch=2.0)


@pytest.mark.parametrize("name, value", [("batch_tokens", 0), ("batch_tokens", 0.5), ("tokens_seen", -1)])
def test_token_counts_must_be_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of tokens, . or more; it is {value}"):
        PowerLR(make_optimizer(), **{"batch_tokens": BATCH, **POWER, name: value})


def test_a_refused_batch_leaves_the_scheduler_as_it_was():
    scheduler = PowerLR(make_optimizer(), batch_tokens=BATCH, **POWER)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match="batch_tokens must be a whole number of tokens, 1 or more; it is -4"):
        scheduler.set_batch_tokens(-4)
    with pytest.raises(ValueError, match=r"PowerLR\.step takes no epoch"):
        scheduler.step(3)
    assert scheduler.state_dict() == before


def test_numpy_counts_become_plain_ints():
    scheduler = PowerLR(make_optimizer(), batch_tokens=numpy.int64(BATCH), tokens_seen=numpy.int64(3), **POWER)
    state = scheduler.state_dict()
    assert type(state["tokens"]) is int and type(state["batch_tokens"]) is int


def test_an_optimizer_made_with_a_rate_is_warned_about(recwarn):
    with pytest.warns(UserWarning, match=r"largest lr is 0\.001, and PowerLR multiplies .* with lr=1\.0"):
        PowerLR(make_optimizer(1e-3, 5e-4), batch_tokens=BATCH, **POWER)
    PowerLR(make_optimizer(1.0, 1 / 256), batch_tokens=BATCH, **POWER)
    assert not recwarn.list


def test_trainer_logs_the_rates_and_resumes_with_them(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM, Trainer, TrainingArguments

    length, batch_tokens, steps = 16, 2 * 2 * 16, 8
    fields = dict(a=0.5, warmup_tokens=2 * batch_tokens, decay=Decay(start=5 * batch_tokens, tokens=3 * batch_tokens))
    rows = [{"input_ids": [i] * length, "labels": [i] * length} for i in range(32)]

    def train(resume=None):
        torch.manual_seed(0)
        model = GraniteForCausalLM(
            GraniteConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        scheduler = PowerLR(optimizer, batch_tokens=batch_tokens, **fields)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        logged = [(entry["step"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]
        return logged, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    pure = Power(**fields)
    expected = [(k + 1, pure(tokens=k * batch_tokens, batch=batch_tokens / 4096)) for k in range(steps)]
    logged, weights = train()
    assert logged == expected
    resumed, resumed_weights = train(resume=str(tmp_path / "checkpoint-3"))
    assert resumed == expected
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert not math.isclose(expected[3][1], expected[7][1])


@pytest.mark.filterwarnings("ignore:You're resuming")  # of its loader's position, not this project's
def test_lightning_steps_at_the_rates_and_resumes_with_them(tmp_path):
    import lightning

    batch_tokens, steps = 2 * 2 * 16, 8
    fields = dict(a=0.5, warmup_tokens=2 * batch_tokens, decay=Decay(start=5 * batch_tokens, tokens=3 * batch_tokens))
    rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.rates = torch.nn.Linear(4, 1), []

        def training_step(self, batch, _):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1.0)
            scheduler = PowerLR(optimizer, batch_tokens=batch_tokens, **fields)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_before_optimizer_step(self, optimizer):
            self.rates.append(optimizer.param_groups[0]["lr"])

    def train(steps, resume=None):
        torch.manual_seed(0)
        module = Module()
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=steps, accumulate_grad_batches=2, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    pure = Power(**fields)
    expected = [pure(tokens=k * batch_tokens, batch=batch_tokens / 4096) for k in range(steps)]
    assert train(steps).rates == expected
    train(3)
    assert train(steps, resume=tmp_path / "3.ckpt").rates == expected[3:]
