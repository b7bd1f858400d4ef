"""Ops on the requests' own tokens, beside the references of the plugins that define them."""

from types import SimpleNamespace

import torch
from kernel_logit_rules.ban import ANY, ban
from kernel_ngram.lookup import look_up_slots
from kernel_penalties.penalise import Penalise

VOCAB, SLOTS, LENGTH, WIDTH = 13, 5, 60, 3
NGRAMS = [(1, 1, 1), (2, 4, 4), (3, 9, 7)]  # least, most, number


def step_of(draw, rows, device):
    """Requests of all lengths, with drafts of which some are before a logits row and some are not there."""
    known = torch.tensor([1, 17, 40, 58, 33], dtype=torch.int32)
    tokens = torch.randint(0, VOCAB, (SLOTS, LENGTH + 1), generator=draw).int()
    ancestors = torch.randint(-1, WIDTH, (rows, WIDTH), generator=draw).sort(1).values.int()
    ancestors[:, 1:][ancestors[:, 1:] == ancestors[:, :-1]] = -1
    some = SimpleNamespace(
        slot=torch.randint(0, SLOTS, (rows,), generator=draw),
        row=torch.randint(0, 4, (rows,), generator=draw),
        history=tokens,
        known=known,
        num_prompt=torch.tensor([1, 9, 40, 5, 20]).int(),
        ancestors=ancestors,
        drafts=torch.randint(-1, VOCAB, (4, WIDTH), generator=draw),
    )
    on = SimpleNamespace(**{name: tensor.to(device) for name, tensor in vars(some).items()})
    on.max_len = 58
    return on


@torch.inference_mode()
def check_penalties(penalise, device):
    """Bit for bit, and other rows stay."""
    draw, reference = torch.Generator().manual_seed(0), Penalise()
    for _ in range(6):
        step = step_of(draw, 9, device)
        numbers = (torch.rand(SLOTS, 3, generator=draw) * 2 + 0.1).to(device)
        logits = (torch.randn(9, VOCAB, generator=draw) * 4).to(device)
        logits[3, 2] = -torch.inf
        index = torch.tensor([0, 2, 3, 5, 8], device=device)
        got = penalise(logits.clone(), index, step, numbers)
        assert torch.equal(got, reference(logits.clone(), index, step, numbers))
        assert torch.equal(got[[1, 4, 6, 7]], logits[[1, 4, 6, 7]])


def output_of(step, row):
    """The output tokens of a logits row's request, the drafts before the row included, one by one."""
    slot, drafts = int(step.slot[row]), step.drafts[step.row[row]].tolist()
    output = step.history[slot, int(step.num_prompt[slot]) : int(step.known[slot])].tolist()
    return output + [drafts[number] for number in step.ancestors[row].tolist() if number >= 0]


def bans_of(draw, outputs, length):
    """Some that hold, and some that do not by a token or by the number."""
    for row in torch.randint(0, len(outputs), (30,), generator=draw).tolist():
        before = ([7] * length + outputs[row])[len(outputs[row]) :]
        kinds = torch.randint(0, 8, (length,), generator=draw).tolist()
        token, until = torch.randint(0, VOCAB, (2,), generator=draw).tolist()
        yield [
            row,
            token,
            3 * until,
            *(ANY if kind < 4 else 3 if kind == 4 else max(have, 0) for kind, have in zip(kinds, before)),
        ]


@torch.inference_mode()
def check_bans(given, device, length):
    """What is given, and the reference, against the sentence that says what a ban is."""
    draw, held, tried = torch.Generator().manual_seed(length), 0, 0
    for _ in range(8):
        step = step_of(draw, 9, device)
        in_front = torch.where(step.ancestors < 0, WIDTH, step.ancestors).sort(1).values
        step.ancestors = torch.where(in_front == WIDTH, -1, in_front).int()
        outputs = [output_of(step, row) for row in range(9)]
        step.position = step.num_prompt[step.slot].long() + torch.tensor([len(output) for output in outputs], device=device)
        bans, wanted = list(bans_of(draw, outputs, length)), torch.randn(9, VOCAB, generator=draw)
        logits = wanted.to(device, copy=True)
        for row, token, until, *prefix in bans:
            after = ([None] * length + outputs[row])[len(outputs[row]) :]
            holds = len(outputs[row]) < until and all(want in (ANY, have) for want, have in zip(prefix, after, strict=True))
            wanted[row, token] = -torch.inf if holds else wanted[row, token]
            held, tried = held + holds, tried + 1
        for op in (ban, given):
            assert torch.equal(op(logits.clone(), torch.tensor(bans, device=device), step).cpu(), wanted)
    assert tried // 10 < held < tried * 0.9


@torch.inference_mode()
def check_look_up(look_up, device, least, most, number):
    draw, found = torch.Generator().manual_seed(least), 0
    for alphabet in (2, 3, 6):
        tokens = torch.randint(0, alphabet, (8, LENGTH), generator=draw).int().to(device)
        slots = torch.randperm(8, generator=draw)[:6].to(device)
        known = torch.tensor([1, 2, 17, 33, 49, 60], device=device)
        given = tokens, slots, known, LENGTH, least, most, number
        expected = look_up_slots(*given)
        assert look_up(*given).tolist() == expected.tolist()
        found += int((expected >= 0).any(1).sum())
    assert 6 < found < 18
