// How the kernels that walk a scan (lib/quad_scan) read its tensors. The importing file declares x, B, C, dy
// and params.headdim, as far as it uses them.

import package::lib::quad_scan::Token;

fn load_B(at: vec4u) -> mat4x4f {
  return mat4x4f(B[at.x], B[at.y], B[at.z], B[at.w]);
}

fn load_C(at: vec4u) -> mat4x4f {
  return mat4x4f(C[at.x], C[at.y], C[at.z], C[at.w]);
}

// Sixteen p of a row of x, quads p of it: zero past the end of the head.
fn load_x(row: u32, p: vec4u) -> Token {
  let at = row + min(p, vec4u(params.headdim / 4u - 1u));
  let inside = vec4f(p < vec4u(params.headdim / 4u));
  return Token(inside.x * x[at.x], inside.y * x[at.y], inside.z * x[at.z], inside.w * x[at.w]);
}

fn load_dy(row: u32, p: vec4u) -> Token {
  let at = row + min(p, vec4u(params.headdim / 4u - 1u));
  let inside = vec4f(p < vec4u(params.headdim / 4u));
  return Token(inside.x * dy[at.x], inside.y * dy[at.y], inside.z * dy[at.z], inside.w * dy[at.w]);
}
