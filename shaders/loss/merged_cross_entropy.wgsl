// Cross entropy from statistics of the parts of a row's logits: merged[t] = log sum_r exp(lse[r, t]) and
// loss = mean over scored rows of merged[t] - keep picked[t] - spread total[t]. A row is scored when
// 0 <= label < vocab.
//
// lse [parts, T]; labels, picked, total and merged [T].
//  merge: one workgroup; scale = 1 / scored rows (0 when there is none).
//  unmerge: one invocation takes one row. With d = dloss scale, 0 for rows that are not scored:
//    dlse[r] = d exp(lse[r] - merged), dpicked = -keep d, dtotal = -spread d.
// exp is taken of values <= 0 only, up to rounding. f32, in a fixed order.

import package::lib::index::workgroup_index;

struct Params { rows: u32, parts: u32, vocab: u32, keep: f32, spread: f32 }

@group(0) @binding(0) var<storage, read> lse: array<f32>;
@group(0) @binding(1) var<storage, read> picked: array<f32>;
@group(0) @binding(2) var<storage, read> total: array<f32>;
@group(0) @binding(3) var<storage, read> labels: array<i32>;
@group(0) @binding(4) var<storage, read_write> merged: array<f32>;
@group(0) @binding(5) var<storage, read_write> scale: array<f32>;
@group(0) @binding(6) var<storage, read_write> loss: array<f32>;
@group(0) @binding(7) var<storage, read> dloss: array<f32>;
@group(0) @binding(8) var<storage, read_write> dlse: array<f32>;
@group(0) @binding(9) var<storage, read_write> dpicked: array<f32>;
@group(0) @binding(10) var<storage, read_write> dtotal: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

var<workgroup> counts: array<f32, WG>;
var<workgroup> sums: array<f32, WG>;

fn is_scored(row: u32) -> bool {
  return u32(labels[row]) < params.vocab;     // a negative label becomes a large one
}

@compute @workgroup_size(WG)
fn merge(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  var count = 0.0;
  for (var t = lane; t < params.rows; t += WG) {
    var m = lse[t];
    for (var r = 1u; r < params.parts; r++) { m = max(m, lse[r * params.rows + t]); }
    var s = 0.0;
    for (var r = 0u; r < params.parts; r++) { s += exp(lse[r * params.rows + t] - m); }
    let all = m + log(s);
    merged[t] = all;
    if (is_scored(t)) {
      var value = all - params.keep * picked[t];
      if (params.spread != 0.0) { value -= params.spread * total[t]; }
      sum += value;
      count += 1.0;
    }
  }
  counts[lane] = count;
  sums[lane] = sum;
  workgroupBarrier();
  if (lane != 0u) { return; }
  for (var i = 1u; i < WG; i++) {
    count += counts[i];
    sum += sums[i];
  }
  let inverse = select(0.0, 1.0 / max(count, 1.0), count > 0.0);
  scale[0] = inverse;
  loss[0] = sum * inverse;
}

@compute @workgroup_size(WG)
fn unmerge(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let t = workgroup_index(wid, nwg) * WG + lane;
  if (t >= params.rows) { return; }
  let d = select(0.0, dloss[0] * scale[0], is_scored(t));
  for (var r = 0u; r < params.parts; r++) {
    dlse[r * params.rows + t] = d * exp(lse[r * params.rows + t] - merged[t]);
  }
  dpicked[t] = -params.keep * d;
  dtotal[t] = -params.spread * d;
}
