"""The same decoder in PyTorch: run by the benchmark, in an interpreter that has torch.

Stands alone, so that this interpreter needs nothing of ours: reads one JSON object on stdin,
prints one on stdout.
"""

import contextlib
import json
import statistics
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]  # noqa: N812


class Block(nn.Module):
  """Attention and a gated MLP around the residual stream."""

  def __init__(self, shape):
    super().__init__()
    embed, mlp = shape['embed'], shape['mlp']
    self.heads, self.head_dim = shape['heads'], shape['head_dim']
    self.norm1, self.norm2 = nn.RMSNorm(embed, eps=1e-6), nn.RMSNorm(embed, eps=1e-6)
    self.qkv = nn.Linear(embed, 3 * self.heads * self.head_dim, bias=False)
    self.out = nn.Linear(self.heads * self.head_dim, embed, bias=False)
    self.gate = nn.Linear(embed, mlp, bias=False)
    self.up = nn.Linear(embed, mlp, bias=False)
    self.down = nn.Linear(mlp, embed, bias=False)

  def forward(self, x, cos, sin):
    """Adds both branches to x [B, L, D]."""
    rows, length, _ = x.shape
    qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, self.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(h.transpose(1, 2).reshape(rows, length, -1))
    h = self.norm2(x)
    return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotate(x, cos, sin):
  first, second = x.chunk(2, -1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Decoder(nn.Module):
  """Token ids to logits; rotary positions, RMSNorm."""

  def __init__(self, shape):
    super().__init__()
    self.embed = nn.Embedding(shape['vocab'], shape['embed'])
    self.blocks = nn.ModuleList(Block(shape) for _ in range(shape['layers']))
    self.norm = nn.RMSNorm(shape['embed'], eps=1e-6)
    self.head = nn.Linear(shape['embed'], shape['vocab'], bias=False)
    for weight in (w for w in self.parameters() if w.ndim > 1):
      nn.init.normal_(weight, std=0.02)
    if shape['embeddings'] == 'tied':
      self.head.weight = self.embed.weight
    frequency = 10000.0 ** -(torch.arange(0, shape['head_dim'], 2) / shape['head_dim'])
    angle = torch.arange(shape['length'])[:, None] * frequency[None]
    self.register_buffer('cos', angle.cos())
    self.register_buffer('sin', angle.sin())

  def forward(self, inputs, targets):
    """Mean loss of a batch of ids [B, L]."""
    x = self.embed(inputs)
    for block in self.blocks:
      x = block(x, self.cos, self.sin)
    logits = self.head(self.norm(x)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _wait(device):
  if device == 'cuda':
    torch.cuda.synchronize()


def _peak(device, dtype, dims, seconds):
  """FLOP/s of the fastest square matrix product."""
  best = 0.0
  for dim in dims:
    left = torch.full((dim, dim), 0.5, device=device, dtype=dtype)
    torch.mm(left, left)
    _wait(device)
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
      torch.mm(left, left)
      _wait(device)
      best = max(best, 2 * dim ** 3 / (time.perf_counter() - start))
  return best


def measure(request):
  """Times the training step of the reference.

  Args:
    request: the model's shape, 'batch_size', 'length', 'dtype', 'compile', 'steps', 'warmup',
      'threads', 'peak_dims' and 'peak_seconds'.
  Returns:
    'times' of the steps in seconds, their 'median', 'peak' FLOP/s, 'loss', 'parameters' (their
    number), 'torch' (its version), 'device'.
  """
  torch.manual_seed(0)
  torch.set_num_threads(request['threads'])
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  if device == 'cuda':  # JAX's default on a GPU multiplies float32 in TF32 too.
    torch.set_float32_matmul_precision('high')
  dtype = getattr(torch, request['dtype'])
  model = Decoder(request).to(device)
  ids = torch.randint(0, request['vocab'], (request['batch_size'], request['length'] + 1),
                      device=device)
  inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                fused=True)
  forward = torch.compile(model) if request['compile'] else model
  half = (torch.autocast(device, dtype=dtype) if dtype != torch.float32
          else contextlib.nullcontext())

  def step():
    with half:
      loss = forward(inputs, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  loss = torch.zeros(())
  for _ in range(request['warmup']):
    loss = step()
  _wait(device)
  peak = _peak(device, dtype, request['peak_dims'], request['peak_seconds'])
  times = []
  for _ in range(request['steps']):
    start = time.perf_counter()
    loss = step()
    _wait(device)
    times.append(time.perf_counter() - start)
  return {'times': times, 'median': statistics.median(times), 'peak': peak, 'loss': loss.item(),
          'parameters': sum(w.numel() for w in model.parameters()), 'torch': torch.__version__,
          'device': device}


if __name__ == '__main__':
  json.dump(measure(json.load(sys.stdin)), sys.stdout)
