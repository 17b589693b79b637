import { cache_read, cache_write, decode_attention } from "../../src/ops/decode_attention.ts";
import * as ref from "../../src/reference/decode_attention.ts";
import { type Draw, opSamples } from "./suite.ts";

const sizes = (
  name: string, B: number, L: number, [Hq, Hkv]: readonly [number, number], capacity: number, Dh: number,
  position: number,
) => ({
  name, reduction: Math.max(capacity, Dh),
  args: (r: Draw) => [
    r.normal([B, L, Hq, Dh]), r.normal([B, Hkv, capacity, Dh]), r.normal([B, Hkv, capacity, Dh]),
    r.of([1], [position], "u32"), 1 / Math.sqrt(Dh),
  ],
});

/** Words of four E4M3 codes, none of them NaN. */
function codes(r: Draw, shape: readonly number[]) {
  const size = shape.reduce((a, b) => a * b, 1);
  const bytes = r.integers([4 * size], 0, 254).data;
  const code = (i: number) => (bytes[i]! < 127 ? bytes[i]! : bytes[i]! + 1);
  return r.of(shape, Array.from({ length: size }, (_, i) =>
    code(4 * i) + 256 * code(4 * i + 1) + 65536 * code(4 * i + 2) + 2 ** 24 * code(4 * i + 3)), "u32");
}

const coded = (...[name, B, L, [Hq, Hkv], capacity, Dh, position]: Parameters<typeof sizes>) => ({
  name: `codes: ${name}`, reduction: Math.max(capacity, Dh),
  args: (r: Draw) => [
    r.normal([B, L, Hq, Dh], 0.05),
    codes(r, [B, Hkv, capacity, Dh / 4]), codes(r, [B, Hkv, capacity, Dh / 4]),
    r.of([1], [position], "u32"), 1 / Math.sqrt(Dh), Math.fround(0.013), 0.75,
  ],
});

export default [
  opSamples({
    op: decode_attention, reference: ref.decode_attention,
    samples: [
      sizes("one token after none", 1, 1, [4, 2], 8, 16, 0),
      sizes("many tokens", 2, 1, [4, 2], 150, 32, 140),
      sizes("fewer keys than lanes", 1, 1, [2, 1], 9, 8, 1),
      sizes("several queries, each with its own end", 1, 4, [4, 1], 40, 8, 30),
      sizes("width without a factor of four", 2, 2, [3, 3], 21, 13, 17),
      sizes("one component", 1, 1, [1, 1], 5, 1, 4),
      sizes("the widest head", 1, 1, [2, 1], 33, 256, 32),
      sizes("queries past the end of the cache", 1, 3, [2, 2], 6, 4, 5),
      sizes("the longest cache that is not cut", 1, 1, [4, 2], 256, 16, 255),
      sizes("a cut cache, of which the first part has keys", 1, 1, [4, 2], 257, 16, 63),
      sizes("the first key of the second part", 1, 1, [4, 2], 257, 16, 64),
      sizes("the last part has one key", 1, 1, [2, 1], 257, 64, 256),
      sizes("queries on both sides of a part's end", 2, 3, [3, 1], 300, 8, 126),
      sizes("queries past the end of a cut cache", 1, 3, [2, 2], 300, 4, 298),
      sizes("a cut cache, width without a factor of four", 1, 2, [2, 1], 400, 13, 390),
      sizes("a cut cache, wide heads that nine queries share", 1, 3, [3, 1], 270, 96, 265),
      sizes("parts longer than 64 keys", 1, 1, [2, 1], 2100, 8, 2099),
      coded("one token after none", 1, 1, [4, 2], 8, 16, 0),
      coded("many tokens, several queries", 2, 3, [4, 2], 150, 32, 140),
      coded("wide heads", 1, 1, [2, 1], 33, 96, 30),
      coded("a cut cache", 1, 2, [4, 2], 300, 16, 290),
      sizes("no cache", 1, 1, [2, 1], 0, 8, 0),
      sizes("no rows", 0, 1, [2, 1], 4, 8, 0),
    ],
    errors: [
      {
        name: "heads that do not divide", args: (r) => sizes("", 1, 1, [3, 2], 4, 4, 0).args(r),
        message: /decode_attention.*divisor of 3.*found 2/,
      },
      {
        name: "another width in the cache",
        args: (r) => [
          r.normal([1, 1, 2, 4]), r.normal([1, 2, 4, 8]), r.normal([1, 2, 4, 8]), r.of([1], [0], "u32"), 1,
        ],
        message: /decode_attention.*k_cache.*4\]/,
      },
      {
        name: "codes without scales", args: (r) => coded("", 1, 1, [2, 1], 4, 8, 0).args(r).slice(0, 5),
        message: /decode_attention.*k_scale must be positive and finite for a cache of codes/,
      },
      {
        name: "codes of another width",
        args: (r) => [
          r.normal([1, 1, 2, 16]), ...coded("", 1, 1, [2, 1], 4, 8, 0).args(r).slice(1),
        ],
        message: /decode_attention.*k_cache must be \[1, Hkv, Lmax, 4\].*\[1, 1, 4, 2\]/,
      },
      {
        name: "scales without codes",
        args: (r) => [...sizes("", 1, 1, [2, 1], 4, 8, 0).args(r), null, 1],
        message: /decode_attention.*v_scale must be null for an f32 cache/,
      },
    ],
  }),
  opSamples({
    op: cache_write, reference: ref.cache_write,
    samples: [
      {
        name: "in the middle",
        args: (r) => [r.normal([2, 3, 7, 5]), r.normal([2, 2, 3, 5]), r.of([1], [4], "u32")],
      },
      {
        name: "one token at the start",
        args: (r) => [r.normal([1, 1, 4, 8]), r.normal([1, 1, 1, 8]), r.of([1], [0], "u32")],
      },
      {
        name: "past the end is dropped",
        args: (r) => [r.normal([1, 2, 4, 4]), r.normal([1, 3, 2, 4]), r.of([1], [2], "u32")],
      },
      {
        name: "no tokens",
        args: (r) => [r.normal([1, 2, 4, 4]), r.normal([1, 0, 2, 4]), r.of([1], [2], "u32")],
      },
      {
        name: "codes, subnormal, halfway between and beyond the largest",
        args: (r) => [
          codes(r, [2, 3, 7, 2]), r.normal([2, 2, 3, 8], 40), r.of([1], [4], "u32"), Math.fround(0.3),
        ],
      },
      {
        name: "codes of every size, past the end too",
        args: (r) => [
          codes(r, [1, 1, 5, 16]), r.of([1, 6, 1, 64], Array.from({ length: 384 }, (_, i) =>
            (i % 2 === 0 ? 1 : -1) * 2 ** (i / 16 - 14) * 1.0625)), r.of([1], [1], "u32"), 1,
        ],
      },
    ],
    errors: [{
      name: "other heads",
      args: (r) => [r.normal([1, 2, 4, 4]), r.normal([1, 1, 3, 4]), r.of([1], [0], "u32")],
      message: /cache_write.*x must be \[1, L, 2, 4\].*\[1, 1, 3, 4\]/,
    }, {
      name: "codes without a scale",
      args: (r) => [codes(r, [1, 2, 4, 4]), r.normal([1, 1, 2, 16]), r.of([1], [0], "u32")],
      message: /cache_write.*scale must be positive and finite for a cache of codes/,
    }],
  }),
  opSamples({
    op: cache_read, reference: ref.cache_read,
    samples: [
      { name: "the first five", args: (r) => [r.normal([2, 3, 7, 5]), 5] },
      { name: "all", args: (r) => [r.normal([1, 2, 6, 8]), 6] },
      { name: "none", args: (r) => [r.normal([1, 2, 6, 8]), 0] },
      { name: "codes", args: (r) => [codes(r, [2, 3, 7, 4]), 5, Math.fround(0.3)], tolerance: 2 ** -30 },
    ],
    errors: [{
      name: "more than there is", args: (r) => [r.normal([1, 1, 4, 4]), 5],
      message: /cache_read.*from 0 to 4.*found 5/,
    }],
  }),
];
