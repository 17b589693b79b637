import { afterAll, describe, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { attention } from "../../src/ops/attention.ts";
import { openDevice } from "../../src/tensor/device.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { testAdapters } from "../support/adapters.ts";
import { Draw } from "./suite.ts";

// With one key a row's weight is 1 whatever its score, so the gradients of query and key are zero: the op
// suite, which measures errors by the largest entry, cannot say how near to zero is near enough.
for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());

    test.each([8, 32, 128])("attention of one token is its value, heads of %i", async (Dh) => {
      const r = new Draw(Dh);
      const [q, k, v, dout] = [[3, 1, 4, Dh], [3, 1, 2, Dh], [3, 1, 2, Dh], [3, 1, 4, Dh]]
        .map((shape) => device.tensor(Float32Array.from(r.normal(shape).data), shape)) as Tensors;
      for (const x of [q, k, v]) x.requiresGrad = true;
      const tape = new Tape();
      const out = tape.run(() => attention(q, k, v, { scale: 1 / Math.sqrt(Dh) }));
      const value = await v.read();
      const found = await out.read();
      found.forEach((x, i) => {
        const [b, h, d] = [Math.floor(i / (4 * Dh)), Math.floor(i / Dh) % 4, i % Dh];
        expect(x).toBeCloseTo(value[(b * 2 + Math.floor(h / 2)) * Dh + d]!, 6);
      });

      const gradients = tape.backward([out], [dout]);
      for (const x of [q, k]) {
        for (const g of await gradients.get(x.key)!.read()) expect(Math.abs(g)).toBeLessThan(1e-5);
      }
      const incoming = await dout.read();
      (await gradients.get(v.key)!.read()).forEach((g, i) => {
        const first = Math.floor(i / Dh) * 2 * Dh + (i % Dh); // two query heads share a value head
        expect(g).toBeCloseTo(incoming[first]! + incoming[first + Dh]!, 5);
      });
      for (const tensor of [...gradients.values(), q, k, v, dout, out]) tensor.dispose();
    });
  });
}

type Tensors = [Tensor, Tensor, Tensor, Tensor];
