// token[b] = index of the largest logit of row b, the lowest index on ties.
//
//   logits [B, V], token u32 [B]. One workgroup takes one row.
import package::lib::index::workgroup_index;
import package::lib::order::order_key;

override WG: u32 = 64;

struct Params {
  rows: u32,
  vocab: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> token: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> lane_key: array<u32, WG>;
var<workgroup> lane_index: array<u32, WG>;

@compute @workgroup_size(WG)
fn argmax(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = workgroup_index(wid, nwg);
  if (row >= params.rows) {
    return;
  }
  var best = 0u;
  var index = params.vocab;
  for (var i = lane; i < params.vocab; i += WG) {
    let key = order_key(logits[row * params.vocab + i]);
    if (key > best) {
      best = key;
      index = i;
    }
  }
  lane_key[lane] = best;
  lane_index[lane] = index;
  workgroupBarrier();
  if (lane == 0u) {
    for (var other = 1u; other < WG; other++) {
      if (lane_key[other] > best || (lane_key[other] == best && lane_index[other] < index)) {
        best = lane_key[other];
        index = lane_index[other];
      }
    }
    token[row] = index;
  }
}
