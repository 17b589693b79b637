// Gradients of causal_conv1d. With v the pre-activation and dv[t] = dy[t] silu'(v[t]):
//   dx[t] = sum_d w_d dv[t+d];   dw_d = sum_t dv[t] x[t-d];   dbias = sum_t dv[t],   pairs of different
//   documents left out.
//
// Shapes as in causal_conv1d.wgsl. The sums over t are left per span of positions: `part` [B * ceil(L /
// SPAN), bias_at + C], the C * K weights first, then biases, for sum_rows.
//
// `causal_conv1d_backward`: one invocation slides over SPAN positions of four channels and recomputes v; the
// three gradients dv behind its span that reach back into it are computed a second time.
// `final_state_backward`: one invocation adds the gradient of the last K inputs of one channel to dx.

import package::lib::index::workgroup_index;
import package::lib::activations::silu_grad4;
import package::lib::conv_input::{input, tap, document_begins};
import package::lib::tile::quad_indices;

struct Params {
  seqlen: u32,
  channels: u32,
  taps: u32, // K
  bias_at: u32, // where a row of `part` has the bias
  total: u32, // batch * ceil(seqlen / SPAN) * ceil(channels / 4), or batch * channels
}

@if(vec4) @group(0) @binding(0) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>; // read with the condition `bias` only
@group(0) @binding(3) var<storage, read> initial_state: array<f32>; // read with the condition `initial` only
@group(0) @binding(4) var<storage, read> seq_idx: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(5) var<storage, read> dy: array<vec4f>;
@else @group(0) @binding(5) var<storage, read> dy: array<f32>;
@if(vec4) @group(0) @binding(6) var<storage, read_write> dx: array<vec4f>;
@else @group(0) @binding(6) var<storage, read_write> dx: array<f32>;
@group(0) @binding(7) var<storage, read_write> part: array<f32>;
@group(0) @binding(8) var<storage, read> dstate: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override SPAN: u32 = 32;

@if(vec4) fn load_dy(row: u32, c: u32) -> vec4f {
  return dy[(row * params.channels + c) / 4u];
}
@else fn load_dy(row: u32, c: u32) -> vec4f {
  let at = quad_indices(row, c, params.channels);
  return vec4f(dy[at.x], dy[at.y], dy[at.z], dy[at.w]);
}

@if(vec4) fn store_dx(row: u32, c: u32, value: vec4f) {
  dx[(row * params.channels + c) / 4u] = value;
}
@else fn store_dx(row: u32, c: u32, value: vec4f) {
  for (var k = 0u; k < 4u && c + k < params.channels; k++) {
    dx[row * params.channels + c + k] = value[k];
  }
}

// Stores the sums of channels c, ..., c + 3 over one span; column d is the tap d positions back.
fn store_part(span: u32, c: u32, dw: mat4x4f, dbias: vec4f) {
  let row = span * (params.bias_at + params.channels);
  for (var k = 0u; k < 4u && c + k < params.channels; k++) {
    let taps = vec4f(dw[0][k], dw[1][k], dw[2][k], dw[3][k]);
    for (var d = 0u; d < params.taps; d++) {
      part[row + (c + k + 1u) * params.taps - 1u - d] = taps[d];
    }
    part[row + params.bias_at + c + k] = dbias[k];
  }
}

@compute @workgroup_size(WG)
fn causal_conv1d_backward(
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
  let span = id / quads; // b * spans + span of the row
  let b = span / spans;
  let first = span % spans * SPAN;
  let end = min(first + SPAN, params.seqlen);
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
  // x1, x2, x3: the inputs 1, 2, 3 positions back, zero in another document; e1, e2, e3: their gradients so
  // far; open: which of them belong to the document of position t.
  var x1 = input(b, t0 - 1, c);
  var x2 = select(input(b, t0 - 2, c), vec4f(0.0), document_begins(b, t0 - 1));
  var x3 = select(input(b, t0 - 3, c), vec4f(0.0), document_begins(b, t0 - 1) || document_begins(b, t0 - 2));
  var e1 = vec4f(0.0);
  var e2 = vec4f(0.0);
  var e3 = vec4f(0.0);
  var open = vec3f(0.0);
  var dw0 = vec4f(0.0);
  var dw1 = vec4f(0.0);
  var dw2 = vec4f(0.0);
  var dw3 = vec4f(0.0);
  var dbias = vec4f(0.0);
  for (var t = first; t < end + 3u; t++) {
    if (document_begins(b, i32(t))) {
      x1 = vec4f(0.0);
      x2 = vec4f(0.0);
      x3 = vec4f(0.0);
      open = vec3f(0.0);
    }
    var x0 = vec4f(0.0);
    var dv = vec4f(0.0);
    if (t < params.seqlen) {
      x0 = input(b, i32(t), c);
      dv = load_dy(b * params.seqlen + t, c) * silu_grad4(offset + w3 * x3 + w2 * x2 + w1 * x1 + w0 * x0);
    }
    if (t < end) {
      dw0 += dv * x0;
      dw1 += dv * x1;
      dw2 += dv * x2;
      dw3 += dv * x3;
      dbias += dv;
    }
    e3 += open.z * w3 * dv;
    if (t >= first + 3u) {
      store_dx(b * params.seqlen + t - 3u, c, e3);
    }
    e3 = e2 + open.y * w2 * dv;
    e2 = e1 + open.x * w1 * dv;
    e1 = w0 * dv;
    open = vec3f(1.0, open.xy);
    x3 = x2;
    x2 = x1;
    x1 = x0;
  }
  store_part(span, c, mat4x4f(dw0, dw1, dw2, dw3), dbias);
}

@compute @workgroup_size(WG)
fn final_state_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let b = id / params.channels;
  let c = id % params.channels;
  for (var d = 1u; d <= min(params.taps, params.seqlen); d++) {
    let t = params.seqlen - d;
    let at = (b * params.seqlen + t) * params.channels + c;
    @if(vec4) dx[at / 4u][at % 4u] += dstate[(id + 1u) * params.taps - d];
    @else dx[at] += dstate[(id + 1u) * params.taps - d];
    if (document_begins(b, i32(t))) {
      return;
    }
  }
}
