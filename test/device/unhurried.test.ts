import { expect, test } from "vitest";
import { unhurried } from "../../src/gpu/provider.node.ts";

const after = <T>(ms: number, value: T) => new Promise<T>((resolve) => setTimeout(resolve, ms, value));

test("waiting passes on results and failures, however the waits overlap", async () => {
  const failing = after(5, null).then(() => {
    throw new Error("lost");
  });
  const waits = [unhurried(after(30, "long")), unhurried(after(2, "short"))];
  await expect(unhurried(failing)).rejects.toThrow("lost");
  expect(await Promise.all(waits)).toEqual(["long", "short"]);
});

test("waiting sleeps: it costs little time of a processor, and timers still run", async () => {
  let ticks = 0;
  const timer = setInterval(() => ticks++, 5);
  const before = process.cpuUsage();
  await unhurried(after(300, null));
  const { user, system } = process.cpuUsage(before);
  clearInterval(timer);
  expect(ticks).toBeGreaterThan(10);
  expect((user + system) / 1000).toBeLessThan(150);
});
