import { expect, test } from "vitest";
import { runInPage, withPage } from "./chromium.ts";
import type { Squares } from "./harness.page.ts";

test("a page runs a compute shader through the web provider", async () => {
  const n = 300;
  const result = await withPage((page, url) =>
    runInPage<Squares>(page, url, "test/browser/harness.page.ts", n));
  expect(result.ids).toContain(result.chosen);
  expect(new Set(result.ids).size).toBe(result.ids.length);
  expect(result.values).toEqual(Array.from({ length: n }, (_, i) => i * i));
});

test("an error inside the page reaches the test with its message", async () => {
  const running = withPage((page, url) => runInPage(page, url, "test/browser/absent.page.ts"));
  await expect(running).rejects.toThrow(/absent\.page\.ts/);
});

test("an uncaught error of the page fails the test that did not look for it", async () => {
  const leaving = withPage(async (page, url) => {
    await page.goto(`${url}test/browser/run.html?module=/test/browser/harness.page.ts&argument=1`);
    await page.evaluate(() => new Promise((done) => {
      setTimeout(() => { throw new Error("nobody catches this"); }, 0);
      setTimeout(done, 50);
    }));
  });
  await expect(leaving).rejects.toThrow("nobody catches this");
});
