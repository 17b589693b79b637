// Rows in expert order: y[slot] = x[floor(slot_token[slot] / K)].
//
//   x [T, D] -> y [T * K, D], in elements of V: vec4f where D is a multiple of 4, or whole numbers with
//   `integers`. One invocation copies every `parts`-th element of one row, so that neighbours touch
//   neighbouring memory. `spare`: slots from offsets[experts] on, and those that lib/plan
//   calls empty, hold no choice; they become zero.
import package::lib::index::workgroup_index;

override WG: u32 = 64;

@if(vec4 && integers) alias V = vec4u;
@if(vec4 && !integers) alias V = vec4f;
@if(!vec4 && integers) alias V = u32;
@if(!vec4 && !integers) alias V = f32;

struct Params {
  slots: u32,
  cols: u32, // in V
  parts: u32,
  topk: u32,
  experts: u32,
}

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read> slot_token: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<V>;
@if(spare) @group(0) @binding(3) var<storage, read> offsets: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn permute(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let slot = i / params.parts;
  if (slot >= params.slots) {
    return;
  }
  // What the table holds never leads out of x; NO_TOKEN is beyond any token.
  let tokens = arrayLength(&x) / max(params.cols, 1u);
  let token = slot_token[slot] / params.topk;
  @if(spare) {
    if (slot >= offsets[params.experts] || token >= tokens) {
      for (var c = i % params.parts; c < params.cols; c += params.parts) {
        y[slot * params.cols + c] = V();
      }
      return;
    }
  }
  let row = min(token, tokens - 1u) * params.cols;
  for (var c = i % params.parts; c < params.cols; c += params.parts) {
    y[slot * params.cols + c] = x[row + c];
  }
}
