import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { lighthouseLog } from "../../demo/sample_text.ts";
import { memorySource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { countTensors } from "../../src/models/accounting.ts";
import { parseConfig } from "../../src/models/config.ts";
import { withPage } from "./chromium.ts";
import type { Download, Page } from "playwright-core";

/** Waits until an element's text matches, and returns it. An error that the page shows instead is thrown. */
async function textOf(page: Page, selector: string, pattern: RegExp): Promise<string> {
  const wanted = page.locator(selector, { hasText: pattern });
  const failed = page.locator(".status.failed");
  await wanted.or(failed).first().waitFor({ timeout: 40_000 });
  if (await wanted.count() === 0) {
    throw new Error(`Waiting for ${pattern} in ${selector}: ${(await failed.allTextContents()).join()}`);
  }
  return (await wanted.textContent())!;
}

async function contentOf(download: Download): Promise<Buffer> {
  return readFileSync(await download.path());
}

test("the page trains, pauses, writes and saves", { timeout: 150_000 }, () => withPage(async (page, url) => {
  const strangers: string[] = [];
  const violations: string[] = [];
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !request.url().startsWith("blob:")) strangers.push(request.url());
  });
  await page.addInitScript(() => {
    const all: string[] = [];
    Object.assign(globalThis, { violations: all });
    document.addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) => {
      all.push(`${violatedDirective} ${blockedURI}`);
    });
  });
  await page.goto(`${url}demo/index.html#steps=16&batch=2&seqlen=32&seed=3`);
  await textOf(page, "#adapter", /^(?!Looking)./);
  expect(await page.locator("[name=steps]").inputValue()).toBe("16");
  expect(await page.locator("#generate").isDisabled()).toBe(true);

  await page.click("#train");
  await textOf(page, "#status.failed", /holds no text/);

  const log = lighthouseLog().slice(0, 20_000);
  await page.fill("#text", log);
  await page.click("#train");
  await textOf(page, "#status", /^Compiling/); // the first step takes seconds
  await page.click("#pause");
  await textOf(page, "#status", /^Paused/);
  const paused = await page.textContent("#f-step");
  await page.fill("[name=length]", "4");
  await page.click("#generate");
  await textOf(page, "#write-status", /bytes at/);
  expect(await page.textContent("#f-step")).toBe(paused);
  await page.click("#pause");

  const finished = await textOf(page, "#status", /^Finished/);
  const unseen = Number(/([\d.]+) bits per byte/.exec(finished)?.[1]);
  const chart = page.locator("#chart");
  expect(await chart.getAttribute("aria-label")).toMatch(/step 16 of 16: training .*trigram/);
  await chart.hover({ position: { x: 46, y: 100 } });
  await textOf(page, "#l-unit", /^step 1$/);
  const first = Number(await page.textContent("#l-train"));
  expect(first).toBeGreaterThan(7);
  expect(unseen).toBeLessThan(0.8 * first);

  // Drafts change the speed and not the text.
  const texts: string[] = [];
  await page.fill("[name=prompt]", "Monday 6 January\n");
  await page.fill("[name=length]", "24");
  await page.fill("[name=temperature]", "0");
  for (const row of ["plain", "draft"]) {
    await page.locator("[name=draft]").setChecked(row === "draft");
    await page.click("#generate");
    await textOf(page, "#write-status", row === "draft" ? /drafts were accepted/ : /second\.$/);
    texts.push((await page.textContent("#written"))!);
    const figures = await page.locator(`#speed-${row} td`).allTextContents();
    const [reading, writing, perPass] = figures.map((figure) => Number(figure.replace(",", "")));
    expect(Math.min(reading!, writing!, perPass!), figures.join()).toBeGreaterThan(0);
  }
  expect(texts[0]!.length).toBeGreaterThan(5);
  expect(texts[1]).toBe(texts[0]);

  const download = async (button: string) => {
    const [file] = await Promise.all([page.waitForEvent("download"), page.click(button)]);
    return contentOf(file);
  };
  const config = parseConfig(await download("#save-config"));
  const bytes = new Uint8Array(await download("#save-weights"));
  const weights = await openSafetensors(memorySource("model.safetensors", bytes));
  expect(weights.tensors.size).toBe(countTensors(config));
  expect(String(await download("#save-chart"))).toMatch(/^<svg[^]*trigram[^]*<\/svg>\s*$/);

  violations.push(...await page.evaluate<string[]>("globalThis.violations"));
  // The source server offers no socket, through which Vite's own client would listen for changes.
  expect(violations.filter((each) => !each.includes("ws:"))).toEqual([]);
  expect(strangers).toEqual([]);
}));

test.each([
  ["a browser without WebGPU", "navigator", /does not offer WebGPU/],
  ["a browser without a GPU", "adapter", /No WebGPU adapter was found/],
])("%s gets a message that says what to do", (_, what, reason) => withPage(async (page, url) => {
  await page.addInitScript((absent) => {
    if (absent === "navigator") Object.defineProperty(Navigator.prototype, "gpu", { get: () => undefined });
  }, what);
  if (what === "adapter") {
    await page.route("**/worker.ts*", async (route) => {
      const response = await route.fetch();
      const blind = "navigator.gpu.requestAdapter = async () => null;\n";
      await route.fulfill({ response, body: blind + await response.text() });
    });
  }
  await page.goto(`${url}demo/index.html`);
  await textOf(page, "#missing-reason", reason);
  const notice = await page.locator("#missing").innerText();
  expect(notice).toMatch(/Chrome or Edge[^]*Safari[^]*Firefox/);
  expect(await page.locator("#workbench").isVisible()).toBe(false);
}));
