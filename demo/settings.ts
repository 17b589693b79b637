/** The numbers of a run, in the form and in the address of the page. */
import { makeRecipe } from "krait";
import { field } from "./dom.ts";

const DEFAULTS = makeRecipe({});
const NAMES = ["steps", "seed", "batch", "seqlen", "lr"] as const;

export type Settings = Record<(typeof NAMES)[number], number>;

/** Fills the form from the address, or with the usual values; later changes go into the address. */
export function bindSettings(form: HTMLFormElement): void {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of NAMES) {
    const input = field(form, name);
    input.value = given.get(name) ?? String(DEFAULTS[name]);
    if (!input.checkValidity()) input.value = String(DEFAULTS[name]);
  }
  form.addEventListener("change", () => {
    if (!form.checkValidity()) return;
    const settings = readSettings(form);
    const changed = NAMES.filter((name) => settings[name] !== DEFAULTS[name]);
    const hash = new URLSearchParams(changed.map((name) => [name, String(settings[name])])).toString();
    history.replaceState(null, "", hash === "" ? location.pathname + location.search : `#${hash}`);
  });
}

/** The numbers as they stand. The form's own checks say whether they are good. */
export function readSettings(form: HTMLFormElement): Settings {
  return Object.fromEntries(NAMES.map((name) => [name, Number(field(form, name).value)])) as Settings;
}
