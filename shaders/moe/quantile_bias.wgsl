// bias = -beta with beta moved by `rate` of the way towards `estimate` and then centred:
//   beta = (1 - rate) * beta + rate * estimate - mean
//
//   bias f32 [E], estimate f32 [E]. One workgroup. With the condition `gated` nothing changes where gate[0]
//   is negative.
import package::lib::reduce::workgroup_sum;

override WG: u32 = 64;

struct Params {
  experts: u32,
  rate: f32,
}

@group(0) @binding(0) var<storage, read_write> bias: array<f32>;
@group(0) @binding(1) var<storage, read> estimate: array<f32>;
@group(0) @binding(2) var<storage, read> gate: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn quantile_bias(@builtin(local_invocation_index) lane: u32) {
  @if(gated) if (gate[0] < 0.0) { return; }
  var sum = 0.0;
  for (var e = lane; e < params.experts; e += WG) {
    sum += (1.0 - params.rate) * bias[e] - params.rate * estimate[e];
  }
  let mean = workgroup_sum(sum, lane) / f32(params.experts);
  for (var e = lane; e < params.experts; e += WG) {
    bias[e] = (1.0 - params.rate) * bias[e] - params.rate * estimate[e] - mean;
  }
}
