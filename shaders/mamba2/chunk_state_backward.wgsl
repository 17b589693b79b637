// Gradients of chunk_state for x, dt and the decay exponent a, from w_t = dS B_t (apply_state.wgsl):
//   s_t = w_t . x_t;  dx_t = weight_t w_t;  ddt_t = decay_t s_t;  da_t = -weight_t s_t;  da_last += sum_t
//   weight_t s_t.
//
// x and dx [B,L,H,P] (dx holds w on entry); decay, weight, ddt and dcumsum (= da) [B,H,nC,Q], 0 past the end
// of the row.
// The chunk's last position has decay 1 whatever a is, so it takes no part in da.
// `positions`: one invocation computes one position of one head. `last`: one invocation sums one chunk of one
// head.

import package::lib::index::workgroup_index;

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // positions: batch * nheads * nchunks * chunk_size; last: batch * nheads * nchunks
}

@if(vec4) @group(0) @binding(0) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> decay: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@if(vec4) @group(0) @binding(3) var<storage, read_write> dx: array<vec4f>;
@else @group(0) @binding(3) var<storage, read_write> dx: array<f32>;
@group(0) @binding(4) var<storage, read_write> ddt: array<f32>;
@group(0) @binding(5) var<storage, read_write> dcumsum: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

// Scales row `row` of dx in place and returns the dot product of what it held with row `row` of x.
@if(vec4) fn scale_row(row: u32, scale: f32) -> f32 {
  var s = vec4f(0.0);
  for (var at = row * params.headdim / 4u; at < (row + 1u) * params.headdim / 4u; at++) {
    let w = dx[at];
    s += w * x[at];
    dx[at] = scale * w;
  }
  return s.x + s.y + s.z + s.w;
}
@else fn scale_row(row: u32, scale: f32) -> f32 {
  var s = 0.0;
  for (var at = row * params.headdim; at < (row + 1u) * params.headdim; at++) {
    let w = dx[at];
    s += w * x[at];
    dx[at] = scale * w;
  }
  return s;
}

@compute @workgroup_size(WG)
fn positions(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let padded = params.nchunks * params.chunk_size;
  let t = id % padded;
  let h = id / padded % params.nheads;
  let b = id / (padded * params.nheads);
  var s = 0.0;
  if (t < params.seqlen) {
    s = scale_row((b * params.seqlen + t) * params.nheads + h, weight[id]);
  }
  ddt[id] = decay[id] * s;
  dcumsum[id] = select(-weight[id] * s, 0.0, t % params.chunk_size == params.chunk_size - 1u);
}

@compute @workgroup_size(WG)
fn last(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  var sum = 0.0;
  for (var q = 0u; q < params.chunk_size - 1u; q++) {
    sum -= dcumsum[id * params.chunk_size + q];
  }
  dcumsum[(id + 1u) * params.chunk_size - 1u] = sum;
}
