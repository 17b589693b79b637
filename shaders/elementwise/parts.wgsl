// Up to three tensors side by side in the rows of one, apart or together:
//
//   split: outN[r, c] = src[r, before N + c];  join: dst[r, before N + c] = inN[r, c]
//
// for r < rows and c < widthN, where `before N` is `first` and the widths of the parts before; a part that is
// not there has width 0. Widths and offsets count elements of V: vec4f where all of them are multiples of 4
// (condition `vec4`). Works on any 32-bit elements. One invocation takes every `parts`-th element of a row.
import package::lib::index::workgroup_index;

@if(vec4) alias V = vec4u;
@else alias V = u32;

@group(0) @binding(0) var<storage, read> src: array<V>;
@group(0) @binding(1) var<storage, read_write> out0: array<V>;
@group(0) @binding(2) var<storage, read_write> out1: array<V>;
@group(0) @binding(3) var<storage, read_write> out2: array<V>;
@group(0) @binding(4) var<storage, read_write> dst: array<V>;
@group(0) @binding(5) var<storage, read> in0: array<V>;
@group(0) @binding(6) var<storage, read> in1: array<V>;
@group(0) @binding(7) var<storage, read> in2: array<V>;

struct Params {
  rows: u32,
  cols: u32, // of src or dst
  first: u32,
  width0: u32,
  width1: u32,
  width2: u32,
  parts: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn split(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.parts;
  if (row >= params.rows) { return; }
  var at = row * params.cols + params.first;
  for (var c = i % params.parts; c < params.width0; c += params.parts) {
    out0[row * params.width0 + c] = src[at + c];
  }
  at += params.width0;
  for (var c = i % params.parts; c < params.width1; c += params.parts) {
    out1[row * params.width1 + c] = src[at + c];
  }
  at += params.width1;
  for (var c = i % params.parts; c < params.width2; c += params.parts) {
    out2[row * params.width2 + c] = src[at + c];
  }
}

@compute @workgroup_size(WG)
fn join(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.parts;
  if (row >= params.rows) { return; }
  var at = row * params.cols + params.first;
  for (var c = i % params.parts; c < params.width0; c += params.parts) {
    dst[at + c] = in0[row * params.width0 + c];
  }
  at += params.width0;
  for (var c = i % params.parts; c < params.width1; c += params.parts) {
    dst[at + c] = in1[row * params.width1 + c];
  }
  at += params.width1;
  for (var c = i % params.parts; c < params.width2; c += params.parts) {
    dst[at + c] = in2[row * params.width2 + c];
  }
}
