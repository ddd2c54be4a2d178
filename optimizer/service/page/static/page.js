// What a page needs of scripts. Without them everything can be read and done, but nothing moves.
import { setUpFront } from "./front.js";
import { follow, poll } from "./live.js";

document.documentElement.classList.add("js");
const main = document.querySelector("main");

let kept = {};

/** The parts that have behaviour; again after the server has drawn them anew. */
function setUp() {
  kept = setUpFront(main, kept);
  for (const form of main.querySelectorAll('form[method="post"]:not([data-ready])')) {
    form.dataset.ready = "1";
    form.addEventListener("submit", () => {
      for (const button of form.querySelectorAll("button")) button.disabled = true;
    });
  }
  const choice = main.querySelector("form[data-max]:not([data-ready])");
  if (choice) limitChoice(choice);
}

/** The button is there for as many variants as can be compared. */
function limitChoice(form) {
  form.dataset.ready = "1";
  const button = form.querySelector("button");
  const update = () => {
    const n = form.querySelectorAll("input:checked").length;
    if (button) button.disabled = n < 2 || n > Number(form.dataset.max);
  };
  form.addEventListener("change", update);
  update();
}

setUp();
// A page from the browser's memory has its buttons disabled by the form that it sent.
window.addEventListener("pageshow", (event) => event.persisted && location.reload());
if ("open" in main.dataset) follow(main, setUp);
else if ("poll" in main.dataset) poll(main, setUp);
