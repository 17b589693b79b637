// Puts two attentions of the same queries over different keys together, as if their keys had been one set:
//
//   lse = log(exp(lse_a) + exp(lse_b)), out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)
//
//   out [B, L, H, Dh], out_a before and the result after · more [B, L, H, Dh], out_b · lse_a, lse_b, lse
//   [B, H, L]. HEAD_VEC4 = Dh / 4
//
// One invocation makes four components of a row. The larger of both sums is taken as 1, so that exp has no
// positive argument and the two weights add up to 1. A row that sees none of the keys of b has an lse_b of
// -1e30 and stays as it is. Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.
import package::lib::index::workgroup_index;

@group(0) @binding(0) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(1) var<storage, read> more: array<vec4f>;
@group(0) @binding(2) var<storage, read> lse_a: array<f32>;
@group(0) @binding(3) var<storage, read> lse_b: array<f32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

struct Params {
  seqlen: u32,
  nheads: u32,
  rows: u32, // B L H
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override HEAD_VEC4: u32 = 8;

@compute @workgroup_size(WG)
fn attention_merge(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / HEAD_VEC4; // as `out` stores them: (b * L + t) * H + h
  if (row >= params.rows) { return; }
  let h = row % params.nheads;
  let t = row / params.nheads % params.seqlen;
  let b = row / (params.nheads * params.seqlen);
  let at = (b * params.nheads + h) * params.seqlen + t;
  let top = max(lse_a[at], lse_b[at]);
  let a = exp(lse_a[at] - top);
  let c = exp(lse_b[at] - top);
  out[i] = (a * out[i] + c * more[i]) / (a + c);
  if (i % HEAD_VEC4 == 0u) { lse[at] = top + log(a + c); }
}
