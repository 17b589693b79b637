import { expect, test } from "vitest";
import { decodeOverhead, replayOverhead } from "../../src/cli/bench/overhead.ts";
import { Generator } from "../../src/infer/engine.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { scale } from "../../src/ops/elementwise.ts";
import { onEveryAdapter } from "../support/devices.ts";

await onEveryAdapter((device) => {
  test("a thousand tiny launches are replayed in one submission, in about the time of hand-written calls",
    async () => {
    const x = device.tensor([1, 2, 3, 4], [4]);
    const { graph } = device.capture(() => {
      for (let i = 0; i < 1000; i++) scale(x, 1 + i % 3).dispose();
    });
    device.replay(graph);
    await device.finish();
    const { submits } = device.stream;
    device.replay(graph);
    await device.finish();
    expect(device.stream.submits - submits).toBe(1);
    device.stream.disposeGraph(graph);
    x.dispose();
    // The ratio belongs to a quiet machine; here other tests run beside, and only a change of kind shows.
    expect((await replayOverhead(device, 5)).ratio).toBeLessThan(4);
  });

  for (const draft of [0, 2]) {
    test(`decoding with ${draft} drafts creates nothing and the host takes a small share`, async () => {
      const config = preset("unit");
      const model = new NemotronH(config, createParameters(device, config, 3));
      const generator = new Generator(model, 64);
      const tokens = generator.generate([1, 2, 3], { maxTokens: 40, draft });
      for (let i = 0; i < 20; i++) await tokens.next(); // every number of accepted drafts has occurred
      const counts = () => ({
        liveBytes: device.pool.liveBytes, buffers: device.pool.created, staging: device.stagingCreated,
        uniforms: device.stream.blocksCreated, groups: device.bindGroupsCreated,
      });
      const before = counts();
      for (let i = 0; i < 15; i++) await tokens.next();
      expect(counts()).toEqual(before);
      if (draft === 0) {
        const { peak, live, total } = generator.memory!;
        expect(peak).toBeLessThan(1.25 * live);
        expect(total).toBeGreaterThan(live);
      }
      await tokens.return(undefined);
      generator.dispose();
      const { token_ms, host_ms, share } = await decodeOverhead(model, 16, draft);
      expect(host_ms).toBeGreaterThan(0);
      expect(token_ms).toBeGreaterThan(host_ms);
      expect(share).toBeLessThan(1);
      model.dispose();
    });
  }
});
