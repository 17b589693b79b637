// One token per row by inverse CDF in index order: the first index whose running weight exceeds u * total.
//
//   logits [B, V], settings [4], cuts [B] (see lib/sampling), counter u32 [4] -> token u32 [B]
//   counter: seed low, seed high, step, stream; u is the Philox uniform of element b. One workgroup, one row.
//
// Invocations sum stretches of the row; the stretch that holds the target is cut into stretches again, until
// it is one token. Where rounding leaves a stretch just short of the target, its last token with a weight is
// taken: never one of weight 0.
import package::lib::index::workgroup_index;
import package::lib::order::order_key;
import package::lib::philox::random_uniform;
import package::lib::sampling::{is_kept, token_weight};

override WG: u32 = 64;

struct Params {
  rows: u32,
  vocab: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> settings: array<f32, 4>;
@group(0) @binding(2) var<storage, read> cuts: array<vec4u>;
@group(0) @binding(3) var<storage, read> counter: array<u32, 4>;
@group(0) @binding(4) var<storage, read_write> token: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> lane_sum: array<f32, WG>;
var<workgroup> chosen: u32; // start of the stretch that holds the target

@compute @workgroup_size(WG)
fn draw(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let b = workgroup_index(wid, nwg);
  if (b >= params.rows) {
    return;
  }
  let row = b * params.vocab;
  let cut = cuts[b];
  var first = 0u;
  var length = params.vocab;
  var target_mass = -1.0; // known to the first lane alone, after the first round
  loop {
    let stretch = (length + WG - 1u) / WG;
    let start = first + lane * stretch;
    var sum = 0.0;
    for (var i = start; i < min(start + stretch, min(first + length, params.vocab)); i++) {
      let logit = logits[row + i];
      if (is_kept(order_key(logit), i, cut)) {
        sum += token_weight(logit, cut, settings[0]);
      }
    }
    lane_sum[lane] = sum;
    workgroupBarrier();
    if (lane == 0u) {
      if (target_mass < 0.0) {
        var total = 0.0;
        for (var other = 0u; other < WG; other++) {
          total += lane_sum[other];
        }
        let key = vec4u(counter[0], counter[1], counter[2], counter[3]);
        target_mass = random_uniform(key, b) * total;
      }
      var owner = 0u;
      var before = 0.0;
      var running = 0.0;
      for (var other = 0u; other < WG; other++) {
        if (lane_sum[other] > 0.0) {
          owner = other;
          before = running;
          running += lane_sum[other];
          if (running > target_mass) {
            break;
          }
        }
      }
      target_mass = max(target_mass - before, 0.0);
      chosen = first + owner * stretch;
    }
    first = workgroupUniformLoad(&chosen);
    length = stretch;
    if (length == 1u) {
      break;
    }
  }
  if (lane == 0u) {
    token[b] = first;
  }
}
