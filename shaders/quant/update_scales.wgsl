// Scales for the next update from the largest magnitudes of the last ones ("delayed scaling"), in place:
//   history[slot, position % length] = max over magnitudes[slot] as f32, 0 where that is not finite
//   scales[slot] = max over history[slot] / tops[slot], or as it was where that is 0
//   magnitudes[slot] = 0
//
// magnitudes u32 [slots, entries] (bits), history f32 [slots, length], scales and tops f32 [slots], counter
// u32 [4] with the position last. One workgroup per slot. Numerics: the quotient is rounded once.
// Source: Transformer Engine's DelayedScaling with the algorithm "max" and margin 0.

import package::lib::index::workgroup_index;
import package::lib::exact::exact_quotient;

struct Params { slots: u32, length: u32, entries: u32 }

@group(0) @binding(0) var<storage, read_write> magnitudes: array<u32>;
@group(0) @binding(1) var<storage, read_write> history: array<f32>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(0) @binding(3) var<storage, read> tops: array<f32>;
@group(0) @binding(4) var<storage, read> counter: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
var<workgroup> lanes: array<f32, WG>;

@compute @workgroup_size(WG)
fn update_scales(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let slot = workgroup_index(wid, nwg);
  if (slot >= params.slots) { return; }
  let at = counter[3] % params.length;
  var most = 0.0;
  for (var i = lane; i < params.length; i += WG) {
    if (i != at) { most = max(most, history[slot * params.length + i]); }
  }
  lanes[lane] = most;
  workgroupBarrier();
  if (lane == 0u) {
    var newest = 0u;
    for (var i = 0u; i < params.entries; i++) {
      newest = max(newest, magnitudes[slot * params.entries + i]);
      magnitudes[slot * params.entries + i] = 0u;
    }
    if (newest >= 0x7f800000u) { newest = 0u; }
    history[slot * params.length + at] = bitcast<f32>(newest);
    most = bitcast<f32>(newest);
    for (var i = 0u; i < WG; i++) { most = max(most, lanes[i]); }
    let scale = bitcast<f32>(exact_quotient(bitcast<u32>(most), bitcast<u32>(tops[slot])));
    if (scale > 0.0) { scales[slot] = scale; }
  }
}
