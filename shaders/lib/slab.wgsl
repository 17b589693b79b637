// Register tiles of four rows: sixteen of their dimensions as four matrices, each holding a vec4 of dimensions with a
// column per row. A head of 64 dimensions is four slabs. Products of slabs are products of mat4x4f, so a kernel that
// owns four rows and meets four others at a time is a handful of lines.

struct Slab { a: mat4x4f, b: mat4x4f, c: mat4x4f, d: mat4x4f }

// The four rows of a step: with subgroups each lane of a quad loads one row and the quad shares the loads, otherwise
// every lane loads all four.
@if(subgroups) alias Place = u32;
@else alias Place = vec4u;

// Numbers of the four rows first .. first + 3; `quad` is the lane's number in its quad.
@if(subgroups) fn next_four(first: u32, quad: u32) -> Place { return first + quad; }
@else fn next_four(first: u32, quad: u32) -> Place { return first + vec4u(0u, 1u, 2u, 3u); }

// One vec4 of each lane of the quad, a column each.
@if(subgroups)
fn spread(x: vec4f) -> mat4x4f {
  return mat4x4f(quadBroadcast(x, 0u), quadBroadcast(x, 1u), quadBroadcast(x, 2u), quadBroadcast(x, 3u));
}

// Dot products of the rows of x and of y: [row of y][row of x].
fn slab_dot(x: Slab, y: Slab) -> mat4x4f {
  return transpose(x.a) * y.a + transpose(x.b) * y.b + transpose(x.c) * y.c + transpose(x.d) * y.d;
}

// acc + x p: row r of acc gains the sum over n of p[r][n] times row n of x.
fn slab_add(acc: Slab, x: Slab, p: mat4x4f) -> Slab {
  return Slab(acc.a + x.a * p, acc.b + x.b * p, acc.c + x.c * p, acc.d + x.d * p);
}

fn scale_columns(x: mat4x4f, f: vec4f) -> mat4x4f {
  return mat4x4f(x[0] * f.x, x[1] * f.y, x[2] * f.z, x[3] * f.w);
}

// Row r times f[r].
fn slab_scale(x: Slab, f: vec4f) -> Slab {
  return Slab(scale_columns(x.a, f), scale_columns(x.b, f), scale_columns(x.c, f), scale_columns(x.d, f));
}
