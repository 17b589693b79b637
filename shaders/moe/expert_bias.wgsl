// bias_e += rate * sign(mean(counts) - counts_e): busy experts become less attractive, idle ones more so.
//
//   bias f32 [E], counts u32 [E]. One workgroup. The mean is compared in integers, so that a balanced expert
//   stays put. With the condition `gated` nothing changes where gate[0] is negative.
// Source: "Auxiliary-loss-free load balancing strategy for mixture-of-experts" (arXiv 2408.15664).

override WG: u32 = 64;

struct Params {
  experts: u32,
  rate: f32,
}

@group(0) @binding(0) var<storage, read_write> bias: array<f32>;
@group(0) @binding(1) var<storage, read> counts: array<u32>;
@group(0) @binding(2) var<storage, read> gate: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> total: atomic<u32>;

@compute @workgroup_size(WG)
fn expert_bias(@builtin(local_invocation_index) lane: u32) {
  @if(gated) if (gate[0] < 0.0) { return; }
  var sum = 0u;
  for (var e = lane; e < params.experts; e += WG) {
    sum += counts[e];
  }
  atomicAdd(&total, sum);
  workgroupBarrier();
  let all = atomicLoad(&total);
  let whole = all / params.experts;
  let above_whole = all % params.experts != 0u;
  for (var e = lane; e < params.experts; e += WG) {
    let n = counts[e];
    if (n > whole) {
      bias[e] -= params.rate;
    } else if (n < whole || above_whole) {
      bias[e] += params.rate;
    }
  }
}
