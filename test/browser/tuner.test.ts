import { expect, test } from "vitest";
import { runInPage, withPage } from "./chromium.ts";
import type { TunerReport, TunerVisit } from "./tuner.page.ts";

test("a page measures in the background, goes on at the next visit, and uses what it found", () => withPage(
  async (page, url) => {
    const visit = (options: TunerVisit["options"], decided: number, more: Partial<TunerVisit> = {}) =>
      runInPage<TunerReport>(page, url, "test/browser/tuner.page.ts", { options, decided, ...more });
    const decisions = (text: string | null) =>
      (JSON.parse(text!) as { decisions: { class: string; choice: string }[] }).decisions;
    const [defaults, measured] = [["many", "many", "many"], ["once", "once", "once"]];

    // No time: nothing is measured. Some time, cut short as soon as something is there: the rest comes later.
    const none = await visit({ tuning: "background", tuningBudgetMs: 0 }, 0);
    expect(none).toMatchObject({ choices: defaults, text: null });
    const some = await visit({ tuning: "background" }, 1);
    expect(some.place).toBe(none.place);
    expect(some.choices).toEqual(defaults);
    const first = decisions(some.text);
    const all = await visit({ tuning: "background" }, 3);
    expect(decisions(all.text)).toEqual(expect.arrayContaining(first));
    expect(decisions(all.text).map(({ choice }) => choice)).toEqual(measured);
    // The visit before may have gone on until the page was left, in the order of use.
    const used = all.choices.filter((choice) => choice === "once").length;
    expect(used).toBeGreaterThanOrEqual(first.length);
    expect(all.choices).toEqual([...measured.slice(0, used), ...defaults.slice(used)]);
    expect((await visit({}, 3)).choices).toEqual(measured);
    expect((await visit({ tuning: false }, 3)).choices).toEqual(defaults);

    // What is not of this browser, driver and build counts for nothing, and harms nothing.
    const whole = all.text!;
    const foreign = {
      "cut short": whole.slice(0, whole.length / 2), "not JSON": "choices: none", "no text": 5, "empty": "",
      "another driver": whole.replace(/"driver": "[^"]*"/, '"driver": "999.0"'),
      "another build": whole.replace(/"build": "[^"]*"/, '"build": "0"'),
    };
    for (const [what, stored] of Object.entries(foreign)) {
      expect(stored, what).not.toBe(whole);
      expect((await visit({}, 0, { stored })).choices, what).toEqual(defaults);
    }
    expect((await visit({}, 0, { stored: whole })).choices).toEqual(measured);
    expect((await visit({ tuning: "background" }, 0, { withoutStore: true })).choices).toEqual(defaults);
  }), 120_000);
