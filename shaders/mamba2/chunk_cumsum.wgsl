// dt = clamp(softplus(dt_raw + dt_bias), lo, hi) and the decay exponent a_i = sum_{m<=i} dt_m A, A =
// -exp(A_log).
//
// dt_raw [B,L,H], A_log and dt_bias [H]; dt and dA_cumsum [B,H,nC,Q]. The sum restarts in each chunk and is
// kept in f32:
// later kernels take exp of differences of it only. Positions past the end of the row get dt = 0, so that the
// exponent (and with it the state) stays as it was. One invocation walks one chunk of one head.

import package::lib::index::workgroup_index;
import package::lib::activations::softplus;

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
@group(0) @binding(3) var<storage, read_write> dt: array<f32>;
@group(0) @binding(4) var<storage, read_write> dA_cumsum: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn chunk_cumsum(
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
  let out = ((b * params.nheads + h) * params.nchunks + c) * params.chunk_size;
  let A = -exp(A_log[h]);
  let bias = dt_bias[h];
  var a = 0.0;
  for (var q = 0u; q < params.chunk_size; q++) {
    var step = 0.0;
    if (q < length) {
      let raw = dt_raw[(b * params.seqlen + first + q) * params.nheads + h];
      step = clamp(softplus(raw + bias), params.lo, params.hi);
    }
    a += step * A;
    dt[out + q] = step;
    dA_cumsum[out + q] = a;
  }
}
