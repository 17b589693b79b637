// Gradients of chunk_cumsum. With alpha_m = sum_{i>=m} dcumsum_i within the chunk:
//   ddt_raw_m = (ddt_m + A alpha_m) sigmoid(dt_raw_m + dt_bias), 0 where dt was clamped;
//   dA_log    = A sum_m dt_m alpha_m;   ddt_bias = sum_m ddt_raw_m.
//
// ddt, dcumsum and dt are [B,H,nC,Q], ddt_raw [B,L,H]. The two sums are left per chunk, [B*nC, H], for
// sum_rows. Positions past the end of the row have no ddt_raw, but their dcumsum (the chunk's last exponent)
// counts. One invocation walks one chunk of one head backwards.

import package::lib::index::workgroup_index;
import package::lib::activations::{sigmoid, softplus};

struct Params {
  seqlen: u32,
  nheads: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * nheads
  lo: f32,
  hi: f32,
}

@group(0) @binding(0) var<storage, read> dt_raw: array<f32>;
@group(0) @binding(1) var<storage, read> A_log: array<f32>;
@group(0) @binding(2) var<storage, read> dt_bias: array<f32>;
@group(0) @binding(3) var<storage, read> ddt: array<f32>;
@group(0) @binding(4) var<storage, read> dcumsum: array<f32>;
@group(0) @binding(5) var<storage, read_write> ddt_raw: array<f32>;
@group(0) @binding(6) var<storage, read_write> dA_log_part: array<f32>;
@group(0) @binding(7) var<storage, read_write> ddt_bias_part: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn chunk_cumsum_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let h = id % params.nheads;
  let c = id / params.nheads % params.nchunks;
  let b = id / (params.nheads * params.nchunks);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  let chunk = ((b * params.nheads + h) * params.nchunks + c) * params.chunk_size;
  let A = -exp(A_log[h]);
  let bias = dt_bias[h];
  var alpha = 0.0;
  var dA = 0.0;
  var dbias = 0.0;
  for (var q = params.chunk_size; q > length; q--) {
    alpha += dcumsum[chunk + q - 1u];
  }
  for (var q = length; q > 0u; q--) {
    alpha += dcumsum[chunk + q - 1u];
    let at = (b * params.seqlen + first + q - 1u) * params.nheads + h;
    let v = dt_raw[at] + bias;
    let free = softplus(v);
    dA += clamp(free, params.lo, params.hi) * alpha;
    let slope = select(sigmoid(v), 0.0, free < params.lo || free > params.hi);
    let d = (ddt[chunk + q - 1u] + A * alpha) * slope;
    ddt_raw[at] = d;
    dbias += d;
  }
  dA_log_part[id] = A * dA;
  ddt_bias_part[id] = dbias;
}
