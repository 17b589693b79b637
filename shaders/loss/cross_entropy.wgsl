// lse[t] = log sum_v exp(logit[t, v]) and picked[t] = logit[t, label[t]], taken one chunk of the vocabulary
// at a time; then loss = mean over scored rows of lse[t] - picked[t]. A row is scored when 0 <= label <
// vocab.
//
// logits [T, stride] holds the columns chunk .. chunk + width of the whole; labels [T].
//  chunk_lse: one workgroup takes one row. Each invocation keeps a running maximum m and s = sum exp(x - m);
//    the pairs of the workgroup are joined in a fixed order, and the chunk's m + log(s) with what earlier
//    chunks left in lse. `first` (the first chunk) starts afresh.
//  mean: one workgroup; scale = 1 / scored rows (0 when there is none), loss = scale * sum.
// exp is taken of values <= 0 only. Source: Milakov & Gimelshein, "Online normalizer calculation for softmax"
// (2018).

import package::lib::activations::log1p_unit;
import package::lib::index::workgroup_index;

struct Params { rows: u32, stride: u32, width: u32, chunk: u32, vocab: u32 }

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> labels: array<i32>;
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> picked: array<f32>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;
@group(0) @binding(5) var<storage, read_write> scale: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
const LOWEST: f32 = -3.4028234e38;

var<workgroup> maxima: array<f32, WG>;
var<workgroup> sums: array<f32, WG>;

@compute @workgroup_size(WG)
fn chunk_lse(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let row = workgroup_index(wid, nwg);
  var m = LOWEST;
  var s = 0.0;
  if (row < params.rows) {
    // Four columns per step, so that the running sum is rescaled once for four.
    for (var j = lane * 4u; j < params.width; j += WG * 4u) {
      let i = min(j + vec4u(0u, 1u, 2u, 3u), vec4u(params.width - 1u)) + row * params.stride;
      let x = vec4f(logits[i.x], logits[i.y], logits[i.z], logits[i.w]);
      let high = max(m, max(max(x.x, x.y), max(x.z, x.w)));
      let e = select(vec4f(), exp(x - high), j + vec4u(0u, 1u, 2u, 3u) < vec4u(params.width));
      s = s * exp(m - high) + (e.x + e.y + e.z + e.w);
      m = high;
    }
  }
  maxima[lane] = m;
  sums[lane] = s;
  workgroupBarrier();
  if (lane != 0u || row >= params.rows) { return; }
  for (var i = 1u; i < WG; i++) {
    let high = max(m, maxima[i]);
    s = s * exp(m - high) + sums[i] * exp(maxima[i] - high);
    m = high;
  }
  var total = m + log(s);
  @if(!first) {
    let before = lse[row];
    total = max(before, total) + log1p_unit(exp(-abs(before - total)));
  }
  lse[row] = total;
  let at = u32(labels[row]) - params.chunk;   // wraps for labels below the chunk and for negative ones
  if (at < params.width) { picked[row] = logits[row * params.stride + at]; }
}

@compute @workgroup_size(WG)
fn mean(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  var count = 0.0;
  for (var t = lane; t < params.rows; t += WG) {
    if (u32(labels[t]) < params.vocab) {
      sum += lse[t] - picked[t];
      count += 1.0;
    }
  }
  maxima[lane] = count;
  sums[lane] = sum;
  workgroupBarrier();
  if (lane != 0u) { return; }
  for (var i = 1u; i < WG; i++) {
    count += maxima[i];
    sum += sums[i];
  }
  let inverse = select(0.0, 1.0 / max(count, 1.0), count > 0.0);
  scale[0] = inverse;
  loss[0] = sum * inverse;
}
