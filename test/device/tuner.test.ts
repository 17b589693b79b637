import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { GpuError } from "../../src/gpu/errors.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { type Decision, tune, tuneBeside } from "../../src/kernel/tune.ts";
import { bucket, choose, classText, defineTunable, parseClass, tunables } from "../../src/kernel/tuner.ts";
import { choiceTable, TunerCache } from "../../src/kernel/tuner_cache.ts";
import { folderStore } from "../../src/kernel/tuner_store.node.ts";
import { add, scale } from "../../src/ops/elementwise.ts";
import { matmul } from "../../src/ops/matmul.ts";
import { type Device, type DeviceOptions, openDevice } from "../../src/tensor/device.ts";
import { randomTensor, trial } from "../../src/tensor/trial.ts";
import { testAdapters } from "../support/adapters.ts";
import { onEveryAdapter } from "../support/devices.ts";

type Way = "once" | "many" | "wrong" | "whole" | "broken" | "lost";
/** Twice a vector: at once, in many steps, wrongly, as integers, with an error, and killing the device. */
const doubling = defineTunable({
  name: "test/doubling",
  classOf: ({ n, ways }: { n: number; ways: string }) => ({ n: bucket(n), ways }),
  candidates: (_: Device, { ways }) => ways.split(".") as Way[],
  fallback: (_, { ways }) => ways.split(".")[0] as Way,
  trial: (device, { n }) => trial(() => ({ x: randomTensor(device, [n]) }), ({ x }, way: Way) => {
    if (way === "broken") throw new GpuError("This way is broken.\nVery.");
    if (way === "lost") device.destroy();
    if (way === "whole") return device.empty(x.shape, "u32");
    let y = way === "wrong" ? add(x, scale(x, 1.01)) : add(x, x);
    if (way === "many") for (let i = 0; i < 100; i++) y = scale(y, 1);
    return y;
  }),
  tolerance: () => 1e-6,
});
afterAll(() => tunables.delete(doubling.name));

const folder = mkdtempSync(join(tmpdir(), "krait-tuner-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Runs `tune` on the classes of `ways`. */
async function decide(open: () => Promise<Device>, ways: readonly string[], options = {}): Promise<Decision[
  ]> {
  const classes = ways.map((each) => ({ tunable: doubling.name, class: `n=4096 ways=${each}` }));
  return tune({ open, classes, ...options });
}

await onEveryAdapter((device, openAnother) => {
  const open = () => openAnother();

  test("the faster candidate is chosen, and a much slower one is given up", async () => {
    const [forth, back] = await decide(open, ["once.many", "many.once"]);
    expect(forth).toMatchObject({ choice: "once", default: "once" });
    expect(forth!.rejected["many"]).toMatch(/^[\d.]+ times as slow$/);
    expect(Object.keys(forth!.ms)).toEqual(["once"]);
    expect(back).toMatchObject({ choice: "once", default: "many", rejected: {} });
    expect(back!.ms["many"]! / back!.ms["once"]!).toBeGreaterThan(2);
  });

  test("a candidate with another result, an error or a lost device is rejected, with the reason", async (
    ) => {
    const decisions = await decide(open, ["many.wrong.broken.lost.whole.once"]);
    expect(decisions).toHaveLength(1);
    const { choice, rejected } = decisions[0]!;
    expect(choice).toBe("once");
    expect(rejected["wrong"]).toMatch(/^differs by 5\.\de-3, allowed 1\.0e-6$/);
    expect(rejected["whole"]).toMatch(/^differs/);
    expect(rejected["broken"]).toBe("fails: This way is broken.");
    expect(rejected["lost"]).toMatch(/^fails: .*closed by its owner/);
  });

  test("a default that cannot run stays the default", async () => {
    expect(await decide(open, ["broken.once", "once"])).toMatchObject([
      { choice: "broken", ms: {} }, { choice: "once", ms: {}, rejected: {} },
    ]);
  });

  test("the budget ends it between candidates, and the next run goes on with what is left", async () => {
    expect(await decide(open, ["many.once"], { budgetMs: 0 })).toEqual([]);
    const ways = ["many.once", "once.many", "once.wrong"];
    const controller = new AbortController();
    const first = await decide(open, ways, {
      signal: controller.signal, onDecision: () => controller.abort(),
    });
    expect(first).toHaveLength(1);
    const tried: string[] = [];
    const second = await decide(open, ways, {
      known: first, onProgress: ({ class: text }: { class: string }) => void tried.push(text),
    });
    expect(second.map((d) => d.class)).toEqual(ways.slice(1).map((each) => `n=4096 ways=${each}`));
    expect(tried.some((text) => text.endsWith("many.once"))).toBe(false);
    // What was found slow or wrong is not tried again, even where nothing was chosen.
    const known = { ...second[1]!, choice: null, rejected: { wrong: "is wrong" } };
    expect(await decide(open, ["once.wrong"], { known: [known] })).toMatchObject(
      [{ choice: "once", ms: {} }]);
  });

  test("measuring leaves no memory behind", async () => {
    const own = await open();
    const before = own.pool.liveBytes;
    const destroy = own.destroy.bind(own);
    own.destroy = () => {};
    await decide(() => Promise.resolve(own), ["many.wrong.broken.once"]);
    expect(own.pool.liveBytes).toBe(before);
    destroy();
  });

  test("ops ask for their kernels by shape class", () => {
    const [a, b] = [randomTensor(device, [40, 24]), randomTensor(device, [24, 20])];
    matmul(a, b, {}).dispose();
    const [used] = device.choices.used.filter(({ tunable }) => tunable.startsWith("matmul/"));
    expect(used).toMatchObject({ count: 1, source: "default" });
    const shape = parseClass(used!.class)!;
    expect(classText(tunables.get(used!.tunable)!.classOf(shape))).toBe(used!.class);
    for (const dispose of [a, b]) dispose.dispose();
  });

  test("a device keeps its choice; one opened later takes what was measured, and may pin others", async (
    ) => {
    const shape = { n: 100, ways: "many.once.wrong" };
    const text = "n=128 ways=many.once.wrong";
    const [used, later, third] = [await open(), await open(), await open()];
    expect(choose(used, doubling, shape)).toBe("many");
    const measured = { "test/doubling": { [text]: "once" } };
    used.choices.load(measured);
    expect(choose(used, doubling, { ...shape, n: 128 })).toBe("many");
    expect(used.choices.wanted()).toEqual([{ tunable: "test/doubling", class: text, count: 2 }]);
    later.choices.load(measured);
    expect(choose(later, doubling, shape)).toBe("once");
    expect(later.choices.wanted()).toEqual([]);
    expect(later.choices.table()).toEqual(measured);
    later.choices.pin(used.choices.table());
    expect(choose(later, doubling, shape)).toBe("many");
    third.choices.load({ "test/doubling": { [text]: "gone" } });
    third.choices.pin({ "test/doubling": { [text]: "never was" } });
    expect(choose(third, doubling, shape)).toBe("many");
  });

  test("what was measured is kept in a file and read back", async () => {
    const store = folderStore(() => join(folder, device.info.id));
    const cache = new TunerCache(device, store);
    expect(await cache.load()).toEqual([]);
    const decisions = await decide(open, ["many.once", "once.wrong"], {
      onDecision: (decision: Decision) => cache.save(decision),
    });
    expect(await cache.load()).toEqual(decisions);
    await cache.save({ ...decisions[0]!, choice: "many" });
    expect(choiceTable(await cache.load())).toEqual({
      "test/doubling": { "n=4096 ways=many.once": "many", "n=4096 ways=once.wrong": "once" },
    });
    const [file] = readdirSync(join(folder, device.info.id));
    const path = join(folder, device.info.id, file!);
    expect(cache.place).toBe(path);
    const whole = readFileSync(path, "utf8");
    const damaged = {
      "cut short": whole.slice(0, whole.length / 2), "not JSON": "choices: none", "null": "null", "empty": "",
      "another driver": whole.replace(/"driver": "[^"]*"/, '"driver": "999.0"'),
      "another build": whole.replace(/"build": "[^"]*"/, '"build": "0"'),
      "another format": whole.replace("krait-tuning-1", "krait-tuning-0"),
      "no list": whole.replace(/"decisions": \[[\s\S]*\]/, '"decisions": 5'),
    };
    for (const [name, text] of Object.entries(damaged)) {
      expect(text, name).not.toBe(whole);
      writeFileSync(path, text);
      expect(await cache.load(), name).toEqual([]);
    }
    writeFileSync(path, whole.replace('"choice": "many"', '"choice": 7'));
    expect(await cache.load()).toHaveLength(1);
    writeFileSync(path, whole);
    await cache.clear();
    expect(await cache.load()).toEqual([]);
  });

  test("in the background a device of its own measures what is wanted", async () => {
    const used = await open();
    const kept: Decision[] = [];
    choose(used, doubling, { n: 4096, ways: "many.once" });
    const opened: Gpu[] = [];
    const done = tuneBeside(used, async () => {
      const own = await open();
      opened.push(own);
      return own;
    }, {
      load: () => Promise.resolve(kept),
      save: (decision) => {
        kept.push(decision);
        return Promise.resolve();
      },
    });
    for (let waited = 0; kept.length === 0 && waited < 200; waited++) {
      const { graph } = used.capture(() => used.zeros([16]).dispose()); // captures go on as ever
      used.stream.disposeGraph(graph);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    used.destroy();
    await done;
    expect(kept).toMatchObject([{ choice: "once" }]);
    expect(opened.length).toBeGreaterThan(0);
    expect(opened.every((own) => own !== used && own.failure !== null)).toBe(true);
    expect(choose(used, doubling, { n: 4096, ways: "many.once" })).toBe("many");
  });
});

/** Runs `body` with a cache folder of its own, and the tuner as `tuner` says. */
async function withCache<T>(tuner: string, body: () => Promise<T>): Promise<T> {
  const before = { KRAIT_TUNER: process.env["KRAIT_TUNER"], KRAIT_CACHE: process.env["KRAIT_CACHE"] };
  process.env["KRAIT_TUNER"] = tuner;
  process.env["KRAIT_CACHE"] = mkdtempSync(join(folder, "cache-"));
  try {
    return await body();
  } finally {
    for (const [name, value] of Object.entries(before)) {
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
  }
}

describe("tuning in the background", async () => {
  const [adapter] = await testAdapters("own");
  const shape = { n: 4096, ways: "many.once" };
  const settled = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

  test("goes on beside work, whose results stay, stops at its budget, and is taken up again", () => withCache(
    "", async () => {
      let opened = 0;
      const counting = { ...adapter!, request: () => (opened++, adapter!.request()) };
      const open = (options: DeviceOptions) => openDevice({ adapter: counting, ...options });
      const work = async (device: Device) => {
        expect(choose(device, doubling, shape)).toBe("many");
        const [a, b] = [randomTensor(device, [65, 70]), randomTensor(device, [70, 33], 1)];
        const c = matmul(a, b, {});
        const values = await c.read();
        for (const each of [a, b, c]) each.dispose();
        return values;
      };
      const decided = async (device: Device) =>
        (await new TunerCache(device).load())
          .filter(({ tunable, choice }) => tunable === doubling.name && choice !== null);

      const plain = await open({ tuning: false });
      const expected = await work(plain);
      // A budget that is spent with the first device for measuring.
      const hasty = await open({ tuning: "background", tuningBudgetMs: 1 });
      expect(await work(hasty)).toEqual(expected);
      for (let waited = 0; opened < 3 && waited < 5000; waited += 50) await settled(50);
      expect(opened).toBe(3);
      await settled(300);
      choose(hasty, doubling, { ...shape, n: 8192 });
      await settled(600); // twice the time between two looks for new classes
      expect(opened).toBe(3);
      expect(await decided(plain)).toEqual([]);

      const patient = await open({ tuning: "background" });
      let rounds = 0;
      for (; (await decided(plain)).length === 0 && rounds < 500; rounds++) {
        expect(await work(patient)).toEqual(expected);
        await settled(10);
      }
      expect(rounds).toBeGreaterThan(2);
      expect(await work(patient)).toEqual(expected);
      expect(await decided(plain)).toMatchObject([{ class: "n=4096 ways=many.once", choice: "once" }]);
      const next = await open({});
      expect(choose(next, doubling, shape)).toBe("once");
      for (const device of [plain, hasty, patient, next]) device.destroy();
    }));
});

describe("opening a device", async () => {
  const [adapter] = await testAdapters("own");
  const cases = [
    ["takes the measurements of the cache folder", {}, "", "once"],
    ["takes none when it shall not", { tuning: false }, "", "many"],
    ["takes none when the environment says so", {}, "off", "many"],
    ["takes none from a folder that cannot be read", {}, "/dev/null", "many"],
  ] as const;
  for (const [name, options, tuner, expected] of cases) {
    test(name, async () => {
      await withCache(tuner === "off" ? "off" : "", async () => {
        const first = await openDevice({ adapter: adapter! });
        await new TunerCache(first).save({
          tunable: doubling.name, class: "n=64 ways=many.once", choice: "once", default: "many", ms: {},
          rejected: {},
        });
        first.destroy();
        if (tuner === "/dev/null") process.env["KRAIT_CACHE"] = tuner;
        const device = await openDevice({ adapter: adapter!, ...options });
        expect(choose(device, doubling, { n: 64, ways: "many.once" })).toBe(expected);
        device.destroy();
      });
    });
  }
});
