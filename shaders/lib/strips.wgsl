// Matrices in strips, for the kernels of quantised values: which part of which matrix a workgroup takes, and
// where its elements lie.
//
// The importing file declares x (of X), y (of V), tiles, table, jobs, params and WG. Conditions:
//   vec4     rows of whole vectors
//   halves   x is bf16, two to a word
//   jobs     many matrices in one launch: a record of 8 u32 per workgroup, the fields of Matrix
//   grouped  blocks of a column start anew in every group of rows. Block b holds source rows
//            tiles[b] = (group, first, end, 0) and becomes rows b * block .. of y, zeros past its end
//   gather   source row s is row floor(table[s] / per) of x

@if(vec4) alias V = vec4f;
@else alias V = f32;
@if(halves && vec4) alias X = vec2u;
@elif(halves) alias X = u32;
@else alias X = V;

// A workgroup's part of a matrix: its first elements in x and y, its strips, and its entries of amax.
struct Matrix {
  x: u32, y: u32, rows: u32, cols: u32, unit: u32, end: u32, first: u32, partials: u32,
}

fn matrix_of(group: u32) -> Matrix {
  @if(jobs) {
    let at = 8u * group;
    return Matrix(jobs[at], jobs[at + 1u], jobs[at + 2u], jobs[at + 3u], jobs[at + 4u], jobs[at + 5u],
      jobs[at + 6u], jobs[at + 7u]);
  }
  @else {
    let unit = group * WG * params.each;
    return Matrix(0u, 0u, params.rows, params.cols, unit, min(unit + WG * params.each, params.units),
      params.first, params.partials);
  }
}

fn load4(m: Matrix, row: u32, col: u32) -> vec4f {
  let at = m.x + row * m.cols + col;
  @if(halves && vec4) {
    let pair = x[at / 4u];
    return bitcast<vec4f>(vec4u(pair.x << 16u, pair.x & 0xffff0000u, pair.y << 16u, pair.y & 0xffff0000u));
  }
  @elif(vec4) return x[at / 4u];
  @else {
    var v = vec4f();
    for (var i = 0u; i < 4u; i++) {
      if (col + i < m.cols) {
        @if(halves) v[i] = bitcast<f32>((x[(at + i) / 2u] >> ((at + i) % 2u * 16u)) << 16u);
        @else v[i] = x[at + i];
      }
    }
    return v;
  }
}

fn store4(m: Matrix, row: u32, col: u32, v: vec4f) {
  let at = m.y + row * m.cols + col;
  @if(vec4) y[at / 4u] = v;
  @else { for (var i = 0u; i < 4u; i++) { if (col + i < m.cols) { y[at + i] = v[i]; } } }
}

// Elements col .. col + 3 of a row of y, before rounding; zeros where x has no such row.
fn fetch(m: Matrix, row: u32, col: u32) -> vec4f {
  @if(grouped) {
    let tile = tiles[row / params.block];
    let source = tile.y + row % params.block;
    if (source >= tile.z) { return vec4f(); }
    // What tiles and table hold never leads out of them or of x.
    @if(gather) let stored = table[min(source, arrayLength(&table) - 1u)] / params.per;
    @else let stored = source;
    @if(vec4) let last = arrayLength(&x) * 4u / m.cols - 1u;
    @else let last = arrayLength(&x) / m.cols - 1u;
    return load4(m, min(stored, last), col);
  }
  @else {
    if (row >= m.rows) { return vec4f(); }
    return load4(m, row, col);
  }
}

fn magnitudes(v: vec4f) -> vec4u {
  return bitcast<vec4u>(v) & vec4u(0x7fffffffu);
}

fn largest_of(v: vec4u) -> u32 {
  return max(max(v.x, v.y), max(v.z, v.w));
}
