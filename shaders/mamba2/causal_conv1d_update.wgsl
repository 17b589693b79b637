// state[c] <- (state[c,1], ..., state[c,K-1], x[c]);   y[c] = silu(bias[c] + sum_j weight[c,j] state[c,j]).
//
// One decode step of causal_conv1d: state [B,C,K] changes in place, x and y [B,C], weight [C,K], bias [C].
// One invocation updates one channel of one row.

import package::lib::index::workgroup_index;
import package::lib::activations::silu;

struct Params {
  channels: u32,
  taps: u32, // K
  total: u32, // batch * channels
}

@group(0) @binding(0) var<storage, read_write> state: array<f32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>; // read with the condition `bias` only
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn causal_conv1d_update(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let c = id % params.channels;
  var sum = 0.0;
  @if(bias) sum = bias[c];
  for (var j = 0u; j < params.taps; j++) {
    var value = x[id];
    if (j + 1u < params.taps) {
      value = state[id * params.taps + j + 1u];
    }
    state[id * params.taps + j] = value;
    sum += weight[c * params.taps + j] * value;
  }
  y[id] = silu(sum);
}
