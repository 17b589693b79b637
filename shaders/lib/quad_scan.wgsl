// What the kernels share that walk a scan's tokens in blocks of four, a quad of invocations for sixteen rows
// p of a head's state, held in registers.
//
// Invocation q of a quad has the columns n with n / 4 % 4 = q, and of each block token q. It sees the tokens
// of the others in the order q ^ 0, q ^ 1, q ^ 2, q ^ 3 ("its order"), which is what three quad swaps give;
// components and columns that stand for tokens are in this order.

// Four columns (tokens, or n) of sixteen p: a to d are four p each.
struct Tile { a: mat4x4f, b: mat4x4f, c: mat4x4f, d: mat4x4f }
// Sixteen p of one token.
struct Token { a: vec4f, b: vec4f, c: vec4f, d: vec4f }

// The four tokens of a block, of which each invocation has one.
@diagnostic(off, subgroup_uniformity)
fn gather(x: vec4f) -> mat4x4f {
  return mat4x4f(x, quadSwapX(x), quadSwapY(x), quadSwapDiagonal(x));
}

fn gather_tile(x: Token) -> Tile {
  return Tile(gather(x.a), gather(x.b), gather(x.c), gather(x.d));
}

// The same where components are tokens too, and change their order on the way.
@diagnostic(off, subgroup_uniformity)
fn gather_pairs(x: vec4f) -> mat4x4f {
  return mat4x4f(x, quadSwapX(x).yxwz, quadSwapY(x).zwxy, quadSwapDiagonal(x).wzyx);
}

// The sum over the quad of each one's column for this invocation's token.
@diagnostic(off, subgroup_uniformity)
fn reduce(m: mat4x4f) -> vec4f {
  return m[0] + quadSwapX(m[1]) + quadSwapY(m[2]) + quadSwapDiagonal(m[3]);
}

// The same where components are tokens too.
@diagnostic(off, subgroup_uniformity)
fn reduce_pairs(m: mat4x4f) -> vec4f {
  return m[0] + quadSwapX(m[1]).yxwz + quadSwapY(m[2]).zwxy + quadSwapDiagonal(m[3]).wzyx;
}

// The sum over the quad of each one's component for this invocation's token.
@diagnostic(off, subgroup_uniformity)
fn reduce_own(v: vec4f) -> f32 {
  return v.x + quadSwapX(v.y) + quadSwapY(v.z) + quadSwapDiagonal(v.w);
}

// Between the tokens' order in the sequence and that of invocation q, either way.
fn reorder(v: vec4f, q: u32) -> vec4f {
  let odd = select(v, v.yxwz, (q & 1u) != 0u);
  return select(odd, odd.zwxy, (q & 2u) != 0u);
}

// The following are in the order of the sequence.

// The share of the state before the block that reaches each token.
fn entering(kept: vec4f) -> vec4f {
  let two = kept.x * kept.y;
  return vec4f(kept.x, two, two * kept.z, two * kept.z * kept.w);
}

// The share of each token that reaches the end of the block.
fn leaving(kept: vec4f) -> vec4f {
  let two = kept.z * kept.w;
  return vec4f(kept.y * two, two, kept.w, 1.0);
}

// The share of each token that reaches token q, 0 for later ones.
fn reaching(kept: vec4f, q: u32) -> vec4f {
  let low = select(vec4f(1.0, 0.0, 0.0, 0.0), vec4f(kept.y, 1.0, 0.0, 0.0), q == 1u);
  let high = select(vec4f(kept.y * kept.z, kept.z, 1.0, 0.0), leaving(kept), q == 3u);
  return select(low, high, q >= 2u);
}

// The share of token q that reaches each token, 0 for earlier ones.
fn reached(kept: vec4f, q: u32) -> vec4f {
  let one = kept.y * kept.z;
  let low = select(vec4f(1.0, kept.y, one, one * kept.w), vec4f(0.0, 1.0, kept.z, kept.z * kept.w), q == 1u);
  let high = select(vec4f(0.0, 0.0, 1.0, kept.w), vec4f(0.0, 0.0, 0.0, 1.0), q == 3u);
  return select(low, high, q >= 2u);
}

fn scale_columns(m: mat4x4f, by: vec4f) -> mat4x4f {
  return mat4x4f(m[0] * by.x, m[1] * by.y, m[2] * by.z, m[3] * by.w);
}

fn scale_tile(x: Tile, by: vec4f) -> Tile {
  return Tile(scale_columns(x.a, by), scale_columns(x.b, by), scale_columns(x.c, by), scale_columns(x.d, by));
}

fn scale_token(x: Token, by: f32) -> Token {
  return Token(x.a * by, x.b * by, x.c * by, x.d * by);
}

fn add_token(x: Token, y: Token) -> Token {
  return Token(x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d);
}

fn reduce_tile(x: Tile) -> Token {
  return Token(reduce(x.a), reduce(x.b), reduce(x.c), reduce(x.d));
}

// The sum of tokens times their weights.
fn weigh(x: Tile, weight: vec4f) -> Token {
  return Token(x.a * weight, x.b * weight, x.c * weight, x.d * weight);
}

// Dot products of a token with four.
fn token_dots(x: Token, y: Tile) -> vec4f {
  return x.a * y.a + x.b * y.b + x.c * y.c + x.d * y.d;
}

fn token_dot(x: Token, y: Token) -> f32 {
  return dot(x.a, y.a) + dot(x.b, y.b) + dot(x.c, y.c) + dot(x.d, y.d);
}

// A piece of the state applied to what tokens have at its four n (columns: tokens): sums over n, by p.
fn apply(out: ptr<function, Tile>, s: Tile, tokens: mat4x4f) {
  (*out).a += s.a * tokens;
  (*out).b += s.b * tokens;
  (*out).c += s.c * tokens;
  (*out).d += s.d * tokens;
}

// The piece applied from the other side: sums over p, by n.
fn apply_transposed(s: Tile, tokens: Tile) -> mat4x4f {
  return transpose(s.a) * tokens.a + transpose(s.b) * tokens.b + transpose(s.c) * tokens.c +
    transpose(s.d) * tokens.d;
}

// The piece after a block: what is kept of it, and the outer products of four tokens' p and n.
fn update(s: ptr<function, Tile>, kept: f32, by_p: Tile, by_n: mat4x4f) {
  let n = transpose(by_n);
  (*s).a = kept * (*s).a + by_p.a * n;
  (*s).b = kept * (*s).b + by_p.b * n;
  (*s).c = kept * (*s).c + by_p.c * n;
  (*s).d = kept * (*s).d + by_p.d * n;
}

// Pieces pass through memory as rows of four n, sixteen p after each other.
alias Rows = array<vec4f, 16>;

fn from_rows(r: ptr<function, Rows>) -> Tile {
  return Tile(
    transpose(mat4x4f((*r)[0], (*r)[1], (*r)[2], (*r)[3])),
    transpose(mat4x4f((*r)[4], (*r)[5], (*r)[6], (*r)[7])),
    transpose(mat4x4f((*r)[8], (*r)[9], (*r)[10], (*r)[11])),
    transpose(mat4x4f((*r)[12], (*r)[13], (*r)[14], (*r)[15])));
}

fn to_rows(s: Tile) -> Rows {
  let a = transpose(s.a);
  let b = transpose(s.b);
  let c = transpose(s.c);
  let d = transpose(s.d);
  return Rows(a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]);
}
