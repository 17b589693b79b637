// What the kernels of the causal convolution share: its inputs before and in a row, its taps, and where
// documents start.
//
// The importing file declares x, weight, initial_state, seq_idx and params.{seqlen, channels, taps}.

import package::lib::tile::quad_indices;

@if(vec4) fn load_x(row: u32, c: u32) -> vec4f {
  return x[(row * params.channels + c) / 4u];
}
@else fn load_x(row: u32, c: u32) -> vec4f {
  let at = quad_indices(row, c, params.channels);
  return vec4f(x[at.x], x[at.y], x[at.z], x[at.w]);
}

// The inputs of channels c, ..., c + 3 at time t of row b; t < 0 reads the history.
fn input(b: u32, t: i32, c: u32) -> vec4f {
  if (t >= 0) {
    return load_x(b * params.seqlen + u32(t), c);
  }
  @if(initial) {
    let back = t + i32(params.taps);
    if (back >= 0) {
      let at = quad_indices(b, c, params.channels) * params.taps + u32(back);
      return vec4f(initial_state[at.x], initial_state[at.y], initial_state[at.z], initial_state[at.w]);
    }
  }
  return vec4f(0.0);
}

// The weights of channels c, ..., c + 3 for the input d positions back; 0 where the convolution is shorter.
fn tap(c: u32, d: u32) -> vec4f {
  if (d >= params.taps) {
    return vec4f(0.0);
  }
  let at = (quad_indices(0u, c, params.channels) + 1u) * params.taps - 1u - d;
  return vec4f(weight[at.x], weight[at.y], weight[at.z], weight[at.w]);
}

// Whether a document starts at position t of row b.
fn document_begins(b: u32, t: i32) -> bool {
  @if(documents) {
    if (t > 0 && t < i32(params.seqlen)) {
      let at = b * params.seqlen + u32(t);
      return seq_idx[at] != seq_idx[at - 1u];
    }
  }
  return false;
}
