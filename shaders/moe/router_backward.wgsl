// Gradient of the router's weights with respect to the logits; the choice itself and the bias have none.
//
//   normalised: ds_e = scaling * (g_e - sum_f g_f s_f / S) / S, S = sum of the chosen s + 1e-20; otherwise
//               ds_e = scaling * g_e
//   dlogit = ds * s * (1 - s), zero for experts that were not chosen (dlogits comes cleared)
//
//   logits, dlogits [T, E]; topk_idx, dweight [T, K]. One invocation takes one token.
import package::lib::activations::sigmoid;
import package::lib::index::workgroup_index;

override WG: u32 = 64;

struct Params {
  tokens: u32,
  experts: u32,
  topk: u32,
  normalise: u32,
  scaling: f32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> topk_idx: array<u32>;
@group(0) @binding(2) var<storage, read> dweight: array<f32>;
@group(0) @binding(3) var<storage, read_write> dlogits: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn router_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let token = workgroup_index(wid, nwg) * WG + lane;
  if (token >= params.tokens) {
    return;
  }
  let first = token * params.topk;
  var sum = 1.0;
  var mean = 0.0;
  if (params.normalise != 0u) {
    sum = 1e-20;
    for (var k = 0u; k < params.topk; k++) {
      let s = sigmoid(logits[token * params.experts + topk_idx[first + k]]);
      sum += s;
      mean += dweight[first + k] * s;
    }
    mean /= sum;
  }
  for (var k = 0u; k < params.topk; k++) {
    let at = token * params.experts + topk_idx[first + k];
    let x = logits[at];
    // s * (1 - s) as a product of two sigmoids: 1 - s would lose all its digits for a large logit.
    dlogits[at] = params.scaling * (dweight[first + k] - mean) / sum * sigmoid(x) * sigmoid(-x);
  }
}
