// RMS norm, backward to its weight: dweight = sum over tokens of dout * v * rstd, in two passes of fixed
// order.
//
//   v = x, or x * silu(z) with the condition `gated`; x, z, dout [tokens, ngroups, n] · rstd [tokens,
//   ngroups]
//   partial [nparts, ngroups * n] · dweight [ngroups * n]. Elements are V: vec4f where n is a multiple of 4.
//
// sum_tokens: one invocation owns one V of columns and the tokens of one part.
// sum_parts: one invocation owns one V of columns and adds its partial sums, first part first.
import package::lib::index::workgroup_index;
import package::lib::activations::{silu, silu4};

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> x: array<V>;
@if(gated) @group(0) @binding(1) var<storage, read> z: array<V>;
@group(0) @binding(2) var<storage, read> rstd: array<f32>;
@group(0) @binding(3) var<storage, read> dout: array<V>;
@group(0) @binding(4) var<storage, read_write> partial: array<V>;
@group(0) @binding(5) var<storage, read_write> dweight: array<V>;

struct Params {
  tokens: u32,
  ngroups: u32,
  cols: u32, // columns of a group, in V
  per_part: u32, // tokens of a part
  nparts: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn value(i: u32) -> V {
  @if(gated && vec4) return x[i] * silu4(z[i]);
  @elif(gated) return x[i] * silu(z[i]);
  @else return x[i];
}

@compute @workgroup_size(WG)
fn sum_tokens(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let width = params.ngroups * params.cols;
  let part = i / width;
  if (part >= params.nparts) { return; }
  let c = i % width;
  let g = c / params.cols;
  var sum = V();
  let end = min((part + 1u) * params.per_part, params.tokens);
  for (var t = part * params.per_part; t < end; t++) {
    sum += dout[t * width + c] * value(t * width + c) * rstd[t * params.ngroups + g];
  }
  partial[i] = sum;
}

@compute @workgroup_size(WG)
fn sum_parts(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let c = workgroup_index(wid, nwg) * WG + lane;
  let width = params.ngroups * params.cols;
  if (c >= width) { return; }
  var sum = V();
  for (var part = 0u; part < params.nparts; part++) {
    sum += partial[part * width + c];
  }
  dweight[c] = sum;
}
