/**
 * A text to try the page with: a year in the log of a lighthouse that never stood anywhere. It is put
 * together from phrases, but what belongs together fits: the weekday follows the date, the sea the wind, the
 * lamp the season, the moon its phase, and what happens to the boat has consequences. A model can learn that,
 * while counting letters cannot.
 */

const MONTHS = [
  ["January", 31], ["February", 28], ["March", 31], ["April", 30], ["May", 31], ["June", 30], ["July", 31],
  ["August", 31], ["September", 30], ["October", 31], ["November", 30], ["December", 31],
] as const;
const WEEKDAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const QUARTERS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"];
const SEAS = ["smooth", "slight", "moderate", "rough", "very rough", "high"];
const MOONS = ["new moon", "waxing crescent", "first quarter", "waxing gibbous", "full moon",
  "waning gibbous", "last quarter", "waning crescent"];
const KEEPERS = ["Ada", "Tobias", "old Marten"];
const SHIPS = ["a herring drifter", "two trawlers", "a barque under full sail", "the packet for the islands",
  "a collier, low in the water", "a white schooner", "the pilot cutter"];
const BIRDS = {
  winter: ["A snow bunting sat on the rail all morning.", "Great northern divers in the sound.",
    "Gulls walked about the yard as if they paid rent."],
  spring: ["The gannets are back on the outer rock.", "First swallow seen over the store.",
    "Eiders courting below the landing, and loud about it."],
  summer: ["Young terns everywhere; one wears a hat to cross the yard.",
    "Puffins carrying fish past the window.", "A seal slept on the slip until the tide took its bed."],
  autumn: ["Thrushes struck the lantern in the night, eleven of them.", "Geese going south in long lines.",
    "A robin came in with the coal and would not leave."],
};
const CHORES = {
  calm: ["Painted the gallery rail.", "Whitewashed the oil store.", "Tarred the boat and left her to dry.",
    "Dug the potato patch.", "Cleaned every pane of the lantern, inside and out.", "Hung the blankets out.",
    "Mended the path to the landing."],
  wild: ["Kept indoors and trimmed wicks.", "Polished the reflectors.", "Spliced rope by the stove.",
    "Wrote up the stores.", "Stopped a leak above the stair with tow and pitch.",
    "Oiled the clockwork and wound it twice."],
  storm: ["Spray over the lantern.", "The tower hums.", "Could not stand on the gallery."],
};

/** A reproducible stream of numbers in [0, 1). */
function stream(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state >>> 8) / 2 ** 24;
  };
}

/** Writes the log. The same seed gives the same text. */
export function lighthouseLog(seed = 1902): string {
  const random = stream(seed);
  const pick = <T>(from: readonly T[]): T => from[Math.floor(random() * from.length)]!;
  const clock = (hours: number) => {
    const minutes = Math.round(hours * 60);
    return `${String(Math.floor(minutes / 60)).padStart(2, "0")}.${String(minutes % 60).padStart(2, "0")}`;
  };
  const entries: string[] = [];
  let force = 4;
  let quarter = 6;
  let oil = 80;
  let boatAway = 0;
  let day = 0;
  for (const [m, [month, days]] of MONTHS.entries()) {
    for (let date = 1; date <= days; date++, day++) {
      const season = m < 2 || m === 11 ? "winter" : m < 5 ? "spring" : m < 8 ? "summer" : "autumn";
      const rough = season === "winter" ? 6 : season === "summer" ? 3 : 4.5;
      force = Math.max(0, Math.min(10, Math.round(force + (rough - force) * 0.3 + (random() - 0.5) * 5)));
      quarter = (quarter + Math.floor(random() * 3) + 7) % 8;
      const night = 12 + 4.6 * Math.cos((2 * Math.PI * (day + 10)) / 365);
      const moon = MOONS[Math.floor(((day % 29.53) / 29.53) * 8)]!;
      const lines: string[] = [`${WEEKDAYS[(day + 3) % 7]} ${date} ${month}`];

      const wind = force === 0 ? "Calm" : `Wind ${QUARTERS[quarter]}, force ${force}`;
      const glass = 30.4 - force * 0.12 + (random() - 0.5) * 0.2;
      const trend = random() < 0.5 ? "falling" : "rising";
      const sea = SEAS[Math.min(5, Math.floor(force / 1.7))]!;
      lines.push(`${wind}; sea ${sea}. Glass ${glass.toFixed(1)} and ${trend}.`);

      const pints = Math.round(night * 0.6);
      oil -= pints / 8;
      const [lit, out] = [clock(24 - night / 2 - 0.2), clock(night / 2 + 0.2)];
      const phase = `${moon[0]!.toUpperCase()}${moon.slice(1)}${force > 6 ? ", not seen" : ""}.`;
      lines.push(`Lamp lit ${lit}, out ${out}; oil used, ${pints} pints. ${phase}`);

      if (force >= 8) lines.push(`${pick(CHORES.storm)} ${pick(CHORES.wild)}`);
      else if (force >= 5) lines.push(pick(CHORES.wild));
      else lines.push(pick(CHORES.calm));
      if (random() < 0.4) lines.push(pick(BIRDS[season]));
      if (force < 8 && random() < 0.35) {
        lines.push(`Passed ${pick(["to the south", "close in", "far out"])}: ${pick(SHIPS)}.`);
      }

      if (boatAway > 0) {
        boatAway--;
        if (force < 6) {
          lines.push(`The boat is back, ${pick(KEEPERS)} at the tiller, with flour, wicks and letters.`);
          boatAway = 0;
        } else {
          lines.push("No sign of the boat; the sea is too high to land.");
          boatAway = Math.max(boatAway, 1);
        }
      } else if (force < 5 && random() < 0.18) {
        lines.push(`${pick(KEEPERS)} took the boat across for the mail.`);
        boatAway = 2;
      }
      if (oil < 20) {
        oil += 60;
        const stock = Math.round(oil);
        lines.push(`The tender came and landed sixty gallons of oil; the store holds ${stock} again.`);
      }
      entries.push(lines.join("\n"));
    }
  }
  return `${entries.join("\n\n")}\n`;
}
