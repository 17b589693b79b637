import { bmm_chunk } from "../../src/ops/bmm_chunk.ts";
import { bmm_chunk as reference, bmm_chunk_vjp } from "../../src/reference/bmm_chunk.ts";
import { type Sizes, sizes } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

const args = (r: Draw, { B, L, G, N, Q }: Omit<Sizes, "H" | "P">): unknown[] =>
  [r.normal([B, L, G, N]), r.normal([B, L, G, N]), Q];

export default opSamples({
  op: bmm_chunk,
  reference,
  vjp: bmm_chunk_vjp,
  samples: [
    ...Object.entries(sizes).map(([name, s]) => ({ name, args: (r: Draw) => args(r, s) })),
    { name: "many tiles", args: (r) => args(r, { B: 1, L: 130, G: 1, N: 4, Q: 128 }) },
    { name: "chunks of no multiple of four", args: (r) => args(r, { B: 1, L: 30, G: 2, N: 8, Q: 10 }) },
    { name: "state of no multiple of four", args: (r) => args(r, { B: 1, L: 30, G: 2, N: 6, Q: 8 }) },
  ],
  errors: [
    {
      name: "B of another size", args: (r) => [r.normal([1, 4, 1, 2]), r.normal([1, 4, 1, 3]), 4],
      message: /bmm_chunk: B must be \[1, 4, 1, 2\], found \[1, 4, 1, 3\]/,
    },
  ],
});
