"""The worker side: one batched change to the logits, right for drafts as well."""

import torch


class NoRepeat:
    stage, host, argmax_invariant = "mask", False, False

    def __init__(self, max_slots, device):
        self.window = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self.widest = 0  # a host number, so that nothing waits for the device

    def opened(self, opened):
        window = int.from_bytes(opened.payloads.get("no_repeat", b""), "little")
        self.window[opened.slot], self.widest = window, max(window, self.widest)
        return window > 0

    def closed(self, slot):
        self.window[slot] = 0

    def apply(self, logits, step):
        window = self.window[step.slot, None]  # [N, 1]; 0 where nobody asked
        on_path = step.ancestors >= 0  # [N, m] drafts between the known tokens and this row, oldest first
        depth = on_path.sum(1, keepdim=True)
        drafts = step.drafts[step.row].gather(1, step.ancestors.clamp(min=0).long())
        last = depth - torch.arange(step.ancestors.shape[1], device=logits.device) <= window
        back = torch.arange(1, self.widest + 1, device=logits.device)
        at = step.known[step.slot, None] - back  # [N, widest] places of known tokens, newest first
        recent = (back <= window - depth) & (at >= 0)
        known = step.history[step.slot[:, None], at.clamp(min=0)].long()
        tokens = torch.cat([drafts.where(on_path & last, -1), known.where(recent, -1)], 1)
        banned = logits.new_zeros(len(logits), 1 + logits.shape[1], dtype=torch.bool)  # column 0: no token
        return logits.masked_fill_(banned.scatter_(1, tokens + 1, True)[:, 1:], float("-inf"))
