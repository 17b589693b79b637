import { afterAll, describe, expect, test } from "vitest";
import { tune } from "../../src/kernel/tune.ts";
import { classText, parseClass, tunables } from "../../src/kernel/tuner.ts";
import "../../src/ops/index.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";

/** One small class of every tunable, in which candidates differ; several where candidates do other work. */
const SMALL: Readonly<Record<string, string | readonly string[]>> = {
  "matmul/product": "m=64 n=32 k=32 batches=2 transA=false transB=true dtypes=f16.f16.f16",
  "matmul/few_rows": "m=2 n=16 k=1024 weight=bf16",
  "matmul/grouped": "pass=forward rows=32 experts=4 n=16 k=32 dtypes=f32.f16.f32",
  "quant/product": "m=2 n=64 k=64 format=q4",
  "quant/packed_product": ["m=2 n=64 k=64 format=nvfp4", "m=2 n=64 k=64 format=mxfp4"],
  "quant/grouped": "rows=8 experts=4 n=32 k=64 format=q4",
  "quant/grouped_packed": "rows=8 experts=4 n=32 k=64 format=nvfp4",
  "norm/rms_norm": [
    "tokens=8 ngroups=2 n=64 gated=true training=true",
    "tokens=64 ngroups=1 n=512 gated=false training=false",
  ],
  "mamba2/ssd_scan": [false, true].map((training) =>
    `heads=4 seqlen=64 headdim=16 dstate=16 chunk_size=16 training=${training}`),
};

test("every tunable has a class here, and no other", () => {
  expect(Object.keys(SMALL).sort()).toEqual([...tunables.keys()].sort());
});

for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    const bare = await openDevice({ adapter: handle, limits: "default" });
    afterAll(() => [device, bare].forEach((each) => each.destroy()));

    const small = Object.entries(SMALL).flatMap(
      ([name, texts]) => [texts].flat().map((text) => [name, text] as const));
    for (const [name, text] of small) {
      const tunable = tunables.get(name)!;
      const shape = parseClass(text)!;

      test(`${name} ${text}: a class stands for itself, and the default is a candidate`, () => {
        expect(classText(tunable.classOf(shape))).toBe(text);
        for (const each of [device, bare]) {
          expect(tunable.candidates(each, shape)).toContain(tunable.fallback(each, shape));
        }
      });

      test(`${name} ${text}: all candidates agree`, async () => {
        const decisions = await tune({
          open: () => openDevice({ adapter: handle }), classes: [{ tunable: name, class: text }],
            budgetMs: 40_000,
        });
        expect(decisions).toMatchObject([{ tunable: name, class: text }]);
        const { choice, rejected } = decisions[0]!;
        expect(tunable.candidates(device, shape)).toContain(choice);
        for (const reason of Object.values(rejected)) expect(reason).toMatch(/times as slow|compiles for/);
      });
    }
  });
}
