"""Six English passages, written for these tests: 70 to 132 tokens each for the sentence encoder."""

PASSAGES = (
    "The harbour freezes from the edges inward, so in the first cold week of December the ferry still has a lane "
    "of black water to itself, and the children who go to school on the far shore stand at the rail to watch the "
    "ice close behind them. By January there is no lane. A bus takes them around the bay instead, an hour each "
    "way, and the older ones do their homework by the light of a telephone while the younger ones sleep.",
    "To repair a slow puncture, first take the wheel out and find the hole by turning the tube under water. Mark "
    "it, dry the rubber, and roughen a patch a little larger than the one you mean to glue. Most people fail here "
    "because they are impatient: the cement must be dull before the patch goes on, and the patch must be pressed "
    "from its middle towards its rim. Then look at the tyre, since the thorn that did the damage is usually still "
    "in it.",
    "Bread made with rye behaves differently from bread made with wheat. Its flour has little of the protein that "
    "makes dough elastic, and what holds a rye loaf together is starch and the slippery sugars that bind many "
    "times their weight in water. Bakers sour it for a reason: acid slows the enzymes that would otherwise turn "
    "the crumb into paste. The loaf is dense, keeps for two weeks, and tastes best on the third day.",
    "When the committee met again in spring, nobody wanted to be the first to mention the bridge. The engineer's "
    "report ran to forty pages and said, in its polite way, that the money had been spent on the wrong river. A "
    "new road had moved the traffic two miles north, and the old crossing now carried cyclists, some sheep, and a "
    "postman. It was resolved to paint the railings and to discuss the matter further in the autumn.",
    "A satellite in a low orbit sees the same street twice a day, always at the same hours by the sun, and a "
    "computer can tell from the length of a shadow how high a crane has grown since yesterday. This is how "
    "economists now estimate building activity in countries that publish no figures. The method has an obvious "
    "weakness, clouds, and a less obvious one: firms have learned to stack containers where the camera looks.",
    "My grandmother kept bees for fifty years and never wore gloves. She said the sting was the price of the "
    "honey and that a person who will not pay should buy sugar. In her last summer she could no longer lift the "
    "frames, so she sat on a kitchen chair beside the hives and told me which one to open, and what I would see "
    "before I saw it, and she was right nearly every time.",
)
