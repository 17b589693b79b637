// y[t,c] = silu(bias[c] + sum_d w_d[c] x[t-d,c]), w_d = weight[c, K-1-d], K <= 4: a causal depthwise
// convolution.
//
// x and y [B,L,C], weight [C,K], bias [C], state [B,C,K]: the last K inputs, oldest first. Before the row lie
// the inputs of `initial_state` (zeros without the condition `initial`); inputs of another document count as
// zero (seq_idx [B,L], a change of value starts a document; the first one continues the initial state).
// Source: the convolution in front of Mamba-2's scan, arXiv 2405.21060, section 7.
//
// `causal_conv1d`: one invocation slides a window of four inputs over SPAN positions of four channels, so
// that each input is loaded once. `final_state`: one invocation gathers the K last inputs of one channel.

import package::lib::index::workgroup_index;
import package::lib::activations::silu4;
import package::lib::conv_input::{input, tap, document_begins};
import package::lib::tile::quad_indices;

struct Params {
  seqlen: u32,
  channels: u32,
  taps: u32, // K
  // causal_conv1d: batch * ceil(seqlen / SPAN) * ceil(channels / 4); final_state: batch * channels
  total: u32,
}

@if(vec4) @group(0) @binding(0) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>; // read with the condition `bias` only
@group(0) @binding(3) var<storage, read> initial_state: array<f32>; // read with the condition `initial` only
@group(0) @binding(4) var<storage, read> seq_idx: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(5) var<storage, read_write> y: array<vec4f>;
@else @group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read_write> state: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override SPAN: u32 = 16;

@if(vec4) fn store(row: u32, c: u32, value: vec4f) {
  y[(row * params.channels + c) / 4u] = value;
}
@else fn store(row: u32, c: u32, value: vec4f) {
  for (var k = 0u; k < 4u && c + k < params.channels; k++) {
    y[row * params.channels + c + k] = value[k];
  }
}

@compute @workgroup_size(WG)
fn causal_conv1d(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let quads = (params.channels + 3u) / 4u;
  let spans = (params.seqlen + SPAN - 1u) / SPAN;
  let c = id % quads * 4u;
  let first = id / quads % spans * SPAN;
  let b = id / (quads * spans);
  let w0 = tap(c, 0u);
  let w1 = tap(c, 1u);
  let w2 = tap(c, 2u);
  let w3 = tap(c, 3u);
  var offset = vec4f(0.0);
  @if(bias) {
    let at = quad_indices(0u, c, params.channels);
    offset = vec4f(bias[at.x], bias[at.y], bias[at.z], bias[at.w]);
  }
  let t0 = i32(first);
  var x1 = input(b, t0 - 1, c);
  var x2 = select(input(b, t0 - 2, c), vec4f(0.0), document_begins(b, t0 - 1));
  var x3 = select(input(b, t0 - 3, c), vec4f(0.0), document_begins(b, t0 - 1) || document_begins(b, t0 - 2));
  for (var t = first; t < min(first + SPAN, params.seqlen); t++) {
    let x0 = input(b, i32(t), c);
    if (document_begins(b, i32(t))) {
      x1 = vec4f(0.0);
      x2 = vec4f(0.0);
      x3 = vec4f(0.0);
    }
    store(b * params.seqlen + t, c, silu4(offset + w3 * x3 + w2 * x2 + w1 * x1 + w0 * x0));
    x3 = x2;
    x2 = x1;
    x1 = x0;
  }
}

@compute @workgroup_size(WG)
fn final_state(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let b = id / params.channels;
  let c = id % params.channels;
  var open = true; // no document has started after this input
  for (var d = 1u; d <= params.taps; d++) {
    let t = i32(params.seqlen) - i32(d);
    state[(id + 1u) * params.taps - d] = select(0.0, input(b, t, c & ~3u)[c & 3u], open);
    open = open && !document_begins(b, t);
  }
}
