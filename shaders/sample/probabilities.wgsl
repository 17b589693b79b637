// The distribution that a draw is made from: kept weights divided by their sum, zero elsewhere.
//
//   logits [B, V], settings [4], cuts [B] (see lib/sampling) -> probability [B, V]. One workgroup, one row.
import package::lib::index::workgroup_index;
import package::lib::order::order_key;
import package::lib::reduce::workgroup_sum;
import package::lib::sampling::{is_kept, token_weight};

override WG: u32 = 64;

struct Params {
  rows: u32,
  vocab: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> settings: array<f32, 4>;
@group(0) @binding(2) var<storage, read> cuts: array<vec4u>;
@group(0) @binding(3) var<storage, read_write> probability: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn probabilities(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let b = workgroup_index(wid, nwg);
  if (b >= params.rows) {
    return;
  }
  let row = b * params.vocab;
  let cut = cuts[b];
  var sum = 0.0;
  for (var i = lane; i < params.vocab; i += WG) {
    let logit = logits[row + i];
    let weight = select(0.0, token_weight(logit, cut, settings[0]), is_kept(order_key(logit), i, cut));
    probability[row + i] = weight;
    sum += weight;
  }
  let total = workgroup_sum(sum, lane);
  for (var i = lane; i < params.vocab; i += WG) {
    probability[row + i] /= total;
  }
}
