// Blocks of 4 x 4: each column of a mat4x4f holds one row of a block.

// s + x y
fn multiply_add(s: mat4x4f, x: mat4x4f, y: mat4x4f) -> mat4x4f {
  return mat4x4f(add_row(s[0], x[0], y), add_row(s[1], x[1], y),
    add_row(s[2], x[2], y), add_row(s[3], x[3], y));
}

fn add_row(s: vec4f, x: vec4f, y: mat4x4f) -> vec4f {
  return fma(vec4f(x.w), y[3], fma(vec4f(x.z), y[2], fma(vec4f(x.y), y[1], fma(vec4f(x.x), y[0], s))));
}

fn column_of(s: mat4x4f, j: u32) -> vec4f {
  return select(select(s[0], s[1], j == 1u), select(s[2], s[3], j == 3u), j >= 2u);
}
