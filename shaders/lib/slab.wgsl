// Register tiles for kernels in which an invocation owns four rows (two with the condition `two_rows`, for
// wide heads) and walks over other rows, one at a time.
//
// A Part is sixteen dimensions of one row, a Slab the same dimensions of the owned rows: a Block for each
// four dimensions, with a column per row. A row of 64 dimensions is four parts, 64 dimensions of the owned
// rows four slabs. Owned rows pass through a Row, filled in a loop whose bounds a compiler cannot know: so
// each load stands in the program once, and a load that stands there costs tens of milliseconds of
// compilation on the software adapters.

@if(two_rows) const OWNED: u32 = 2u;
@else const OWNED: u32 = 4u;
// One value per owned row.
@if(two_rows) alias Rows = vec2f;
@else alias Rows = vec4f;
@if(two_rows) alias RowsU = vec2u;
@else alias RowsU = vec4u;
@if(two_rows) alias RowsI = vec2i;
@else alias RowsI = vec4i;
@if(two_rows) alias Block = mat2x4f;
@else alias Block = mat4x4f;

alias Row = array<vec4f, 16>;
struct Part { a: vec4f, b: vec4f, c: vec4f, d: vec4f }
struct Slab { a: Block, b: Block, c: Block, d: Block }

// first, first + 1, ...
@if(two_rows) fn row_numbers(first: u32) -> RowsU { return first + vec2u(0u, 1u); }
@else fn row_numbers(first: u32) -> RowsU { return first + vec4u(0u, 1u, 2u, 3u); }

// The part of which each lane of a quad holds four dimensions.
@if(subgroups)
fn gather_part(x: vec4f) -> Part {
  return Part(quadBroadcast(x, 0u), quadBroadcast(x, 1u), quadBroadcast(x, 2u), quadBroadcast(x, 3u));
}

// Dot products of x with the owned rows.
fn part_dot(x: Part, y: Slab) -> Rows {
  return x.a * y.a + x.b * y.b + x.c * y.c + x.d * y.d;
}

@if(two_rows) fn outer(x: vec4f, p: Rows) -> Block { return Block(x * p.x, x * p.y); }
@else fn outer(x: vec4f, p: Rows) -> Block { return Block(x * p.x, x * p.y, x * p.z, x * p.w); }

// Owned row r gains p[r] times x.
fn slab_add(acc: Slab, x: Part, p: Rows) -> Slab {
  return Slab(acc.a + outer(x.a, p), acc.b + outer(x.b, p), acc.c + outer(x.c, p), acc.d + outer(x.d, p));
}

fn scale_columns(m: Block, f: Rows) -> Block {
  @if(two_rows) return Block(m[0] * f.x, m[1] * f.y);
  @else return Block(m[0] * f.x, m[1] * f.y, m[2] * f.z, m[3] * f.w);
}

// Owned row r times f[r].
fn slab_scale(x: Slab, f: Rows) -> Slab {
  return Slab(scale_columns(x.a, f), scale_columns(x.b, f), scale_columns(x.c, f), scale_columns(x.d, f));
}

fn set_column(m: Block, r: u32, x: vec4f) -> Block {
  let first = select(m[0], x, r == 0u);
  let second = select(m[1], x, r == 1u);
  @if(two_rows) return Block(first, second);
  @else return Block(first, second, select(m[2], x, r == 2u), select(m[3], x, r == 3u));
}

fn get_column(m: Block, r: u32) -> vec4f {
  let low = select(m[0], m[1], r == 1u);
  @if(two_rows) return low;
  @else return select(low, select(m[2], m[3], r == 3u), r >= 2u);
}

// Takes owned row r from the part of `row` that begins at vec4 d.
fn set_row(x: ptr<function, Slab>, r: u32, row: ptr<function, Row>, d: u32) {
  (*x).a = set_column((*x).a, r, (*row)[d]);
  (*x).b = set_column((*x).b, r, (*row)[d + 1u]);
  (*x).c = set_column((*x).c, r, (*row)[d + 2u]);
  (*x).d = set_column((*x).d, r, (*row)[d + 3u]);
}

// Puts owned row r into the part of `row` that begins at vec4 d.
fn get_row(x: Slab, r: u32, row: ptr<function, Row>, d: u32) {
  (*row)[d] = get_column(x.a, r);
  (*row)[d + 1u] = get_column(x.b, r);
  (*row)[d + 2u] = get_column(x.c, r);
  (*row)[d + 3u] = get_column(x.d, r);
}
