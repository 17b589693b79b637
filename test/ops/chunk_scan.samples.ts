import { chunk_scan } from "../../src/ops/chunk_scan.ts";
import { chunk_scan as reference, chunk_scan_vjp } from "../../src/reference/chunk_scan.ts";
import { documents, type Sizes, sizes, steps } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

function args(r: Draw, s: Sizes, length?: number, strongest?: number): unknown[] {
  const nchunks = Math.ceil(s.L / s.Q);
  const seq_idx = length === undefined ? null : documents(r, s, length);
  return [
    r.normal([s.B, nchunks, s.G, s.Q, s.Q]), r.normal([s.B, s.L, s.H, s.P]), ...steps(r, s, strongest),
    r.normal([s.B, s.L, s.G, s.N]), r.normal([s.B, nchunks, s.H, s.P, s.N]), r.normal([s.H]), seq_idx,
  ];
}

export default opSamples({
  op: chunk_scan,
  reference,
  vjp: chunk_scan_vjp,
  samples: [
    ...Object.entries(sizes).flatMap(([name, s]) => [
      { name, args: (r: Draw) => args(r, s), reduction: 256 },
      { name: `${name}, documents`, args: (r: Draw) => args(r, s, 6), reduction: 256 },
    ]),
    {
      name: "documents of one or two positions", reduction: 256,
      args: (r) => args(r, { B: 2, L: 40, H: 2, P: 4, G: 1, N: 4, Q: 20 }, 1.5),
    },
    {
      name: "decay to nothing within a tile", reduction: 256,
      args: (r) => args(r, { B: 1, L: 40, H: 3, P: 4, G: 1, N: 4, Q: 40 }, undefined, 400),
    },
    {
      name: "more positions than one slice of the sums", reduction: 1024,
      args: (r) => args(r, { B: 3, L: 50, H: 2, P: 4, G: 1, N: 4, Q: 12 }),
    },
  ],
  errors: [
    {
      name: "CB of another chunk size",
      args: (r) => args(r, sizes["odd sizes"]!).with(0, r.normal([2, 3, 3, 8, 8])),
      message: /chunk_scan: CB must be \[2, 3, 3, 9, 9\], found \[2, 3, 3, 8, 8\]/,
    },
  ],
});
