// Time steps and decays of the scan, in blocks of four tokens: steps[b,h] = D, then for each block the dt of
// the four and what is kept at the four.
//
// dt = clamp(softplus(dt_raw + dt_bias), lo, hi); kept = exp(dt A), A = -exp(A_log), is the share of the
// state that a token keeps, 0 where a document starts (seq_idx differs from the token before). Tokens after
// the last have dt = 0 and keep everything. dt_raw [B,L,H], seq_idx [B,L], steps [B,H,1+2 blocks] of vec4f.
// One invocation computes one block of one head.

import package::lib::index::workgroup_index;
import package::lib::activations::softplus;

struct Params {
  seqlen: u32,
  nheads: u32,
  blocks: u32, // ceil(seqlen / 4)
  total: u32, // batch * blocks * nheads
  lo: f32,
  hi: f32,
}

@group(0) @binding(0) var<storage, read> dt_raw: array<f32>;
@group(0) @binding(1) var<storage, read> A_log: array<f32>;
@group(0) @binding(2) var<storage, read> dt_bias: array<f32>;
@group(0) @binding(3) var<storage, read> D: array<f32>;
@group(0) @binding(4) var<storage, read> seq_idx: array<i32>; // read with the condition `documents` only
@group(0) @binding(5) var<storage, read_write> steps: array<vec4f>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn document_starts(b: u32, t: u32) -> bool {
  @if(documents) {
    let at = b * params.seqlen + t;
    return t > 0u && seq_idx[at] != seq_idx[max(at, 1u) - 1u];
  }
  @else {
    return false;
  }
}

@compute @workgroup_size(WG)
fn ssd_steps(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let h = id % params.nheads;
  let i = id / params.nheads % params.blocks;
  let b = id / (params.nheads * params.blocks);
  let A = -exp(A_log[h]);
  let bias = dt_bias[h];
  var dt = vec4f();
  var kept = vec4f(1.0);
  for (var k = 0u; k < 4u && 4u * i + k < params.seqlen; k++) {
    let t = 4u * i + k;
    let raw = dt_raw[(b * params.seqlen + t) * params.nheads + h];
    dt[k] = clamp(softplus(raw + bias), params.lo, params.hi);
    kept[k] = select(exp(dt[k] * A), 0.0, document_starts(b, t));
  }
  let first = (b * params.nheads + h) * (1u + 2u * params.blocks);
  if (i == 0u) {
    steps[first] = vec4f(D[h]);
  }
  steps[first + 1u + 2u * i] = dt;
  steps[first + 2u + 2u * i] = kept;
}
