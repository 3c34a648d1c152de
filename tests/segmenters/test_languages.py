"""Sentences of many languages, with a bar at each place to cut; and the marks of all scripts.

A third of the cases was written together with the rules, the others before the rules had been tried on them.
"""

from __future__ import annotations

from itertools import groupby

import pytest
import regex

from sentcompress.segmenters.nltk import PunktSegmenter
from sentcompress.segmenters.regex import RegexSegmenter

CASES = """
en The motion was made under Fed. R. Civ. P. 12(b)(6).| It was denied.
en Art. I, Sec. 8, Cl. 3 gives that power to Congress.| Nobody disputes it.
en See 42 U.S.C. § 1983 and 28 C.F.R. § 35.104.| Both apply here.
en The court cited Smith v. Jones, 123 F.3d 456 (9th Cir. 1999), and affirmed.| The case is closed.
en See Fed. R. Evid. 403 and Fed. R. Crim. P. 11.| The rest is dicta.
en Id. at 5; see also Brown v. Bd. of Educ., 347 U.S. 483 (1954).
en It appeared in Harv. L. Rev. 12 (1998).| Few read it.
en Amend. XIV, Sec. 1, guarantees it.| That is settled.
en The rate is in Treas. Reg. 1.61-1 and Rev. Rul. 2004-5.| Ask a lawyer.
en He cites Gen. 1:1, Matt. 5:3 and 1 Cor. 13.| She knows them all.
en The flight leaves at 7:30 a.m. from Gate 5.| It lands at 9 p.m.| She will wait.
en Upgrade to v. 2.1.3 or v2.2.| It is safe.
en Mail info@site.co.uk or visit www.site.co.uk/a.html.| We answer daily.
en Really?!| Yes...| Then go.
en He has a B.Sc., an M.B.A. and a Ph.D. in physics.| They paid for it.
en Lyra Ltd. and Foo Pty. Ltd. merged.| The new firm grew.
en See App. A and Ex. B for the list.| It is long.
en Send it to 12 Oak Ave., Apt. 4, Portland, Ore. today.| Do not wait.
en He wrote "Stop!"| Then he left.
en That is so.[1]| Others disagree.[2][3]| Nobody knows.
en Ursula K. Le Guin wrote it.| I read it.
en He was 12.| Mary was 14.
en I am 12.| My brother is 14.
en World War II.| Churchill spoke.
en He was born on Feb. 3, 1809, in Shrewsbury, Eng. to a doctor.| Nobody noticed.
en Take the α; β and γ follow.| It works.
en He came; she left.| Nobody saw it.
en Plaintiff relies on Fed. R. App. P. 4(a) and on S. Ct. Rule 10.| Neither helps.
en Under Cal. Civ. Code § 1714 and N.Y. Gen. Bus. Law § 349 they are liable.| We agree.
en Subpt. B, para. 4, and Reg. 12 were repealed.| New ones follow.
en See Pub. L. No. 104-191, 110 Stat. 1936.| It is in force.
en Cong. Rec. 1234 has the speech.| Read it.
en Cf. Aristotle, Pol. 3.2 and Plato, Rep. 5.| Both agree.
en We met Capt. Ahab and Sgt. Ruiz at Ft. Worth.| They saluted.
en It is 5 ft. 7 in. tall and weighs 130 lbs. at most.| It moves.
en Python 3.11.2 runs here.| Version 3.12 does not.
en Contact j.doe@mail.example.org.| Thanks.
en The U.S. Court of Appeals agreed.| The U.S. Senate did not.
en "Who are you?" asked Alice.| "Nobody," he said.
en He paused... and then went on.| We listened.
en Meet on Sat. at 10 a.m.| Bring lunch.
en It cost approx. $4.50 vs. $3.99 elsewhere.| Nobody cared.
en The firm, Acme Co., Inc., sued Dr. Ruiz, M.D., in Sept. 2010.| She won.
en Is it No. 5?| No.| It is No. 6.
en He moved under Fed. R. Civ. P. 56 and Local R. 7.1.| The court ruled.
en See U.S. Const. art. I, § 8, cl. 3.| Congress acted.
en Roe v. Wade, 410 U.S. 113 (1973), was overruled.| Dobbs did it.
en Fed. Reg. 12345 and 5 U.S.C. § 552(b)(4) control.| FOIA applies.
en In re Smith, 12 B.R. 34 (Bankr. S.D.N.Y. 1981), is old.| It is still cited.
en Restatement (Second) of Torts § 402A cmt. b.| Read it twice.
en The Dist. Ct. App. reversed.| We affirm.
en Sec. 3. The President shall inform Congress.
en It is in Vol. II, No. 4, pp. 12-15.| Look there.
en Prof. J. K. Smith, Ph.D., and Rev. T. Jones, D.D., met.| They agreed.
en We saw approx. 5 in. of snow.| It melted.
en I live on St. James St. near Ave. B.| It is loud.
en Are you sure?| I am not.| "No!"| She ran.
en Read the file config.yaml.| Then run make.
en He said it was No. 1.| I agree.
en The ratio is 1.5:1.| Use v1.2.3-rc.1 instead.
en She works at Yahoo! and likes it.| He does not.
en It was 5 p.m. EST on Jan. 1st.| Snow fell.
en This is it (see Fig. 2b).| Then stop.
en Mr. and Mrs. O'Neil, Jr., came.| Nobody spoke.
en We ate at 6 p.m.| Dinner was good.
en Nice work, team.👍| Keep going.
en The temperature was -5 °C.| It froze.
en Wait… what?| Nothing.
de Am 3. Oktober feiern wir.| Es ist ein Feiertag.
de Das war im 19. Jahrhundert so.| Heute ist es anders.
de Die 2. Auflage erschien 1984.| Sie ist vergriffen.
de Er kommt am 24. Dezember.| Das ist ein Freitag.
de Nach § 5 Abs. 2 Satz 1 Nr. 3 BGB gilt das nicht.| Der Kläger irrt.
de Wir essen z. B. Brot, d. h. wenig.| Das genügt.
de Er wohnt in der Goethestr. 12 in Bonn.| Dort ist es ruhig.
de Caesar starb 44 v. Chr. in Rom.| Er wurde ermordet.
de Das kostet ca. 5 Mio. Euro bzw. mehr.| Niemand zahlt das.
de Prof. Dr. med. Anna Huber sprach.| Alle hörten zu.
de Er wurde 1984 geboren.| Niemand weiß es.
de Sie fragte: „Kommst du?“| Er schwieg.
de Äpfel, Birnen usw. sind Obst.| Möhren nicht.
de Er ist Zimmer 12.| Die Tür ist zu.
de Der 1. FC Köln gewann.| Die Fans sangen.
de Friedrich II. regierte lange.| Man nannte ihn den Großen.
de Sie kam am 1. Mai 2020 an.| Wir warteten.
de Bis zum 31. Dezember gilt der Rabatt.| Danach nicht mehr.
de Im 2. Stock wohnt Frau Meier.| Sie ist 80.
de Vgl. Art. 3 Abs. 1 GG und BGHZ 12, S. 34 ff. dazu.| Das ist streitig.
de Der sog. Experte hat i. d. R. recht.| Manchmal irrt er.
de Hr. Müller, Tel. 0228 1234, ist da.| Rufen Sie an.
de Das ist Hrn. Maiers Idee, u. a. wegen Geld.| Gut so.
de Er sagte: »Ich gehe.«| Dann ging er.
de Kaiser Karl V. dankte 1556 ab.| Sein Sohn folgte.
de Um 10 Uhr 30.| Der Zug fährt.
de Der 9. November 1989 war ein Donnerstag.| Die Mauer fiel.
de Wir treffen uns am Mo., 5. Mai, um 8 Uhr.| Komm bitte.
de Das 3. Kapitel ist lang.| Das 4. auch.
de Ich bin 30.| Mein Bruder ist 28.
de Siehe Abb. 3, Tab. 2 und S. 45.| Alles klar.
de Gem. § 823 Abs. 1 BGB haftet er.| Der Schaden ist groß.
de Fa. Meier GmbH & Co. KG, Hauptstr. 5, 50667 Köln.| Tel. 123.
de Er sagte: „Ja.“| Sie nickte.
de Heinrich VIII. hatte sechs Frauen.| Zwei starben.
de Das war 1990.| Danach kam er.
de Es kostet 3,50 Euro inkl. MwSt. und Versand.| Danke.
es Vive en EE. UU. desde 1990.| Le gusta.
es Las FF. AA. de EE. UU. llegaron.| Nadie las esperaba.
es El Sr. Pérez y la Sra. Gómez hablaron.| Fue breve.
es Come fruta, p. ej. manzanas.| Es sano.
es Véase pág. 12 y núm. 3.| Allí está todo.
es ¿Qué hora es?| ¡Son las tres!| Gracias.
es Ud. no lo sabe.| Yo sí.
es El art. 5 lo prohíbe.| La ley es clara.
es Murió en el 44 a. C. en Roma.| Fue asesinado.
es La Dra. Ruiz vive en la Av. Bolívar núm. 10.| Es médica.
es Los JJ. OO. de París fueron en 2024.| Los vi.
es El Gral. San Martín y el Lic. Paz hablaron.| Nadie grabó.
es Cuesta aprox. 20 euros, máx. 25.| No es caro.
es Dijo: «Ven».| Ella fue.
es ¡Hola!| ¿Cómo estás?| Bien.
es Trabaja en Foo S.A. desde mayo.| Está contenta.
es Ver págs. 10-12 del cap. 3.| Es corto.
es La Srta. Ruiz, Lic. en Derecho, ganó.| Celebramos.
es D. Juan y Dña. Ana vinieron de EE. UU. ayer.| Llovía.
es El s. XX fue largo.| El XXI no.
es Pesa 5 kg. aprox.| Es mucho.
fr M. Dupont et Mme Curie sont là.| Ils attendent.
fr MM. Dupont et Durand arrivent.| Tout va bien.
fr Prenez p. ex. une pomme.| C'est bon.
fr Il a dit : « Venez ! »| Elle est partie.
fr Voir art. 5 al. 2 et p. 12.| C'est clair.
fr Il est né av. J.-C. en Grèce.| Personne ne sait où.
fr Le vol. 3 et le chap. 4 manquent.| On les cherche.
fr Le Dr Roux et le Pr. Blanc soignent.| Ils sont bons.
fr Cf. p. 12, n. 3, éd. 1999.| Tout y est.
fr Il fait env. 20 °C, c.-à-d. doux.| Profitez-en.
fr Il habite au 5, bd. Voltaire, tél. 01 23.| Sonnez.
fr Il coûte 3,50 € !| C'est cher.
fr L'art. 12 du C. civ. s'applique.| Rien de plus.
fr Mgr. Lefebvre et le Dr. Petit viennent.| On attend.
fr « Où vas-tu ? » demanda-t-il.
fr J.-P. Sartre est né en 1905.| Il est mort en 1980.
it Il Sig. Rossi e la Sig.ra Bianchi parlano.| È tardi.
it Vedi l'art. 3 e le pagg. 5-7.| Sono brevi.
it Mele, pere ecc. sono frutta.| Il pane no.
it Il Dott. Verdi, p. es., lo sa.| Noi no.
it L'Avv. Neri e l'Ing. Gallo, ad es., tacciono.| Fanno bene.
it La Fiat S.p.A. chiude alle ore 18.| Nessuno lo sa.
it Nel sec. XIX, cfr. cap. 2, era così.| Oggi no.
it Il Prof. Conti abita in P.zza Dante, n. 5.| Vieni.
it È nato nel 300 a.C. a Roma.| Morì presto.
pt O Sr. Silva e a Dra. Costa falaram.| Foi breve.
pt Veja a pág. 12 e o art. 5.| É claro.
pt A Silva Ltda. fechou.| Ninguém sabe.
pt O Prof. Dr. João mora na Av. Brasil, n.º 5.| É longe.
pt Por ex. no séc. XX, etc. e tal.| Acabou.
pt A Profa. Lima, Ph.D., saiu às 10h.| Voltou tarde.
nl Neem bijv. een appel.| Dat is gezond.
nl Dhr. de Vries en mevr. Bos kwamen.| Het was laat.
nl Zie blz. 12, d.w.z. het begin.| Daar staat het.
nl Prof. dr. ir. Jansen woont o.a. in Delft.| Hij fietst.
nl Dat kost max. 5 euro, incl. btw.| Niet duur.
nl De heer J. de Vries e.a. kwamen.| Wij niet.
pl Weź np. jabłko, tzn. owoc.| To zdrowe.
pl Mieszka przy ul. Długiej 5.| Jest cicho.
pl Urodził się w 1990 r. w Krakowie.| Tam mieszka.
pl Prof. dr hab. Jan Nowak mówił m.in. o tym.| Wszyscy słuchali.
pl Zob. art. 5 ust. 2 pkt 3 ustawy.| To jasne.
pl Kosztuje 5 tys. zł, tj. dużo.| Nikt nie płaci.
pl Por. art. 3 oraz s. 12.| To ważne.
pl Sp. z o.o. Alfa ma siedzibę w W-wie.| Działa.
cs Přijde 3. října v 8 hod. ráno.| Počkáme.
cs Koupil jablka, hrušky atd. a odešel.| Nikdo neví kam.
cs Viz např. čl. 5 odst. 2 zákona č. 89/2012 Sb. o tom.| Je to jasné.
cs Ing. Novák a MUDr. Malá přišli.| Bylo pozdě.
cs Karel IV. založil univerzitu.| Stojí dodnes.
cs Bydlí v ul. Dlouhé č. p. 5 od r. 1990.| Je spokojen.
hu Vegyél pl. almát.| Egészséges.
hu II. Rákóczi Ferenc ott volt.| Mindenki látta.
hu A 20. században így volt.| Ma már nem.
hu Dr. Kovács kb. 5 percet, ill. többet késett.| Vártunk.
da Han kom den 3. maj kl. 10.| Det regnede.
da Tag f.eks. et æble.| Det er sundt.
da Det kostede ca. 5 mio. kr. i alt.| Dyrt.
da Se fig. 3 og s. 12.| Det er klart.
no Hun bor i Storgt. 5, bl.a. med Ola.| De er glade.
no Han er ca. 20 år, jf. side 3.| Det stemmer.
sv Ta t.ex. ett äpple.| Det är nyttigt.
sv Vi ses kl. 10 den 3 maj.| Ta med mat.
sv Det gäller bl.a. Sverige, dvs. oss.| Resten väntar.
sv Kl. 8 den 1 jan. 2020 började det.| Alla kom.
fi Syö esim. omena.| Se on terveellistä.
fi Tule 3. toukokuuta klo 10.| Odotamme.
fi Ks. s. 5 ja vrt. liite 2.| Siinä se on.
fi Presidentti valittiin 1. helmikuuta.| Hän voitti.
tr Prof. Dr. Ayşe Yılmaz konuştu.| Herkes dinledi.
tr 19. yüzyılda böyleydi.| Şimdi değil.
tr Elma, armut vb. meyvedir.| Ekmek değil.
tr 2. Dünya Savaşı bitti.| Herkes sevindi.
tr II. Mehmed 1453'te İstanbul'u aldı.| Herkes biliyor.
tr Atatürk 10 Kasım 1938'de öldü.| Herkes üzüldü.
ro Dl. Popescu locuiește pe str. Lungă nr. 5.| E liniște.
ro Vezi art. 5 alin. 2 și nr. 3.| E clar.
ru А. С. Пушкин родился в г. Москве в 1799 г. в мае.| Он поэт.
ru Купи фрукты, т. е. яблоки, груши и т. д.| Это полезно.
ru См. рис. 3 и табл. 4.| Там всё есть.
ru Это стоит 5 тыс. руб. или больше.| Никто не платит.
ru Он сказал: «Иди!»| Она ушла.
ru В 1990 г. Иванов переехал.| Он был рад.
ru Им. Ленина ул. закрыта, напр. сегодня.| Идите пешком.
ru Проф. Иванов и акад. Петров спорят.| Никто не слушает.
ru Это было в XIX в. в России.| Тогда жили иначе.
ru Ты где?| Я дома!| Жди...| Он ждёт.
ru Л. Н. Толстой жил в с. Ясная Поляна.| Он писал.
ru Петр I умер в 1725 г.| Его похоронили в Петербурге.
ru См. стр. 12, п. 3.| Далее по тексту.
ru Цена — 1,5 млн руб.| Это дорого.
uk Він живе на вул. Шевченка у м. Києві.| Там тихо.
uk Народився 1990 р. у с. Іванівка.| Там живе.
uk Див. с. 5 та рис. 2.| Усе ясно.
bg Роден е през 1990 г. в гр. София.| Живее там.
el Τι ώρα είναι;| Είναι τρεις.
el Πάρε π.χ. ένα μήλο.| Είναι υγιεινό.
el Ξέρεις το Python;| Όχι, δεν το ξέρω.
el Ο κ. Παπαδόπουλος και η κα. Νίκου ήρθαν.| Είναι εδώ.
el Πού πας;| Σπίτι!| Καλά.
el «Έρχεσαι;»| Δεν απάντησε.
el Γιατί ήρθες\u037e| Επειδή ήθελα.
el Ο κ. Νίκος ρώτησε: «Πού είναι;» και έφυγε.| Τέλος.
el Πόσο κάνει (το κιλό);| Δέκα ευρώ.
my မင်္ဂလာပါ။| နေကောင်းလား။| ကောင်းပါတယ်။
my သူသည်၊ ကျောင်းသို့ သွားသည်။|ပြန်လာသည်။
my ဒါက စာအုပ်ပါ။| အဲဒါက ခဲတံပါ။
my ကျွန်တော် သွားမယ်။| သူ လာမယ်။
km ខ្ញុំទៅផ្សារ។| គាត់នៅផ្ទះ។| ល្អណាស់៕
km តើអ្នកសុខសប្បាយទេ?| ខ្ញុំសុខសប្បាយ។
km តើអ្នកឈ្មោះអ្វី?| ខ្ញុំឈ្មោះសុខ។| រីករាយណាស់។
hi यह एक वाक्य है।| यह दूसरा है॥| ठीक है।
hi डॉ. शर्मा आए।| वे बैठे।
hi यह सच है.| वह गया.
hi एस. के. शर्मा ने कहा, "आओ।"| वह आया।
hi क्या तुम ठीक हो?| हाँ!| अच्छा।
hi प्रो. वर्मा और पं. मिश्र आए।| सब खुश थे।
bn আমি ভাত খাই।| তুমি কী খাও?| ভালো।
bn ডা. রায় এলেন।| তিনি বসলেন।
hy Սա նախադասություն է։| Սա երկրորդն է։
hy Ի՞նչ է դա։| Ոչինչ։
ar هل أنت بخير؟| نعم.| شكرا!
ar جاء د. أحمد اليوم.| كان متعبا.
ar قال: «اذهب.»| ثم خرج.
ar وصل م. علي في 5 مايو.| كان الجو حارا!
ar ص. 12 من الكتاب.| اقرأها.
fa حالت چطور است؟| خوبم.
ur یہ ایک جملہ ہے۔| یہ دوسرا ہے۔
ur کیا آپ ٹھیک ہیں؟| جی ہاں۔| شکریہ!
ur ڈاکٹر صاحب آئے۔| وہ بیٹھ گئے۔
he מה שלומך?| טוב.| תודה!
he ד"ר כהן גר בת"א.| הוא רופא.
he הוא נולד ב-3.5.1990.| היום הוא כאן.
am ሰላም ነው።| ደህና ነህ፧| አዎ።
bo བཀྲ་ཤིས་བདེ་ལེགས།| ང་ནི་བོད་པ་ཡིན།
mn ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ᠃| ᠰᠠᠢᠨ᠃
zh 他说：“走吧。”|她走了！|真的吗？|是的。
zh （他走了。）|她没走。
zh 你好。|（他笑了。）|再见！
zh 她说：「真的吗？」|没人回答。
zh 版本3.5很好．|请用。
zh “走！”他喊。|我们走了。
zh 价格：￥3.50。|很便宜！
ja 「はい。」|彼は笑った。|本当ですか？|そう！
ja 半角の文です｡|次の文です｡
ja 彼は『だめ。』と言った。|私は帰った。
ja えっ！？|本当？|うん…。
ja 「何？」|「いや……。」|彼は黙った。
ko 안녕하세요.| 반갑습니다!| 누구세요?
ko 그는 "가자."라고 말했다.| 나는 갔다.
ko 가격은 3.5달러입니다.| 쌉니다.
th สวัสดีครับ ผมชื่อสมชาย\\n|วันนี้อากาศดี
sk Vezmi napr. jablko, t. j. ovocie.| Je zdravé.
hr Uzmi npr. jabuku.| Zdravo je.
hr Stigao je 3. svibnja oko 10 sati.| Padala je kiša.
sl Glej npr. str. 5 in čl. 3.| Tam piše.
et Võta nt. õun.| See on hea.
vi TS. Nguyễn sống ở TP. Hồ Chí Minh.| Ông ấy vui.
id Dr. Budi tinggal di Jl. Sudirman No. 5.| Rumahnya besar.
mr मी घरी जातो.| तो येत नाही.
ta நான் வீட்டுக்குப் போகிறேன்.| அவன் வரவில்லை.
gu આ ઘર છે.| તે મોટું છે.
pa ਇਹ ਘਰ ਹੈ।| ਉਹ ਵੱਡਾ ਹੈ।
si මම ගෙදර යමි.| ඔහු එන්නේ නැත.
ti ከመይ ኣለኻ፧| ጽቡቕ።
ka ეს სახლია.| ის დიდია.
jv ꦲꦸꦩꦃ꧉| ꦒꦼꦝꦺ꧉
bal ᬩᬮᬶ᭟| ᬲᬾᬮᬫᬢ᭟
nqo ߌ ߣߌ߫ ߛߐ߰ߡߊ߫߹| ߤߊ߲߫.
lo ສະບາຍດີ.| ຂ້ອຍຊື່ຄຳ.
ne म घर जान्छु।| ऊ आउँदैन।
te నేను వెళ్తున్నాను.| అతను రాడు.
dz འདི་དཔེ་ཆ་ཨིན།| དེ་ཁྱིམ་ཨིན།
"""
UNSOLVED = (
    "He owns Acme Corp.| Beta Inc. is hers.",
    "Sn. Demir, 5. Cadde'de oturuyor.| Mutlu.",
    '"לאן אתה הולך?" שאלה.| הוא שתק.',
)
LINES = [line.replace("\\n", "\n").split(" ", 1) for line in CASES.strip().split("\n")]
LANGUAGES = {
    language: [text for _, text in lines] for language, lines in groupby(LINES, lambda line: line[0])
}
COMMAS = set("၊꧈᭞᜵․")
"""Unicode counts them as ends of sentences, but their use is that of a comma."""


def cut(text: str, preset: str = "sentence") -> str:
    return "|".join(RegexSegmenter(RegexSegmenter.Options(preset=preset)).split(text.replace("|", "")))


def test_there_are_enough_cases() -> None:
    assert len(LINES) == len({text for _, text in LINES}) >= 250
    assert len(LANGUAGES) >= 50


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_of_a_language(language: str) -> None:
    wrong = {text: got for text in LANGUAGES[language] if (got := cut(text)) != text}
    assert not wrong


@pytest.mark.xfail(strict=True, reason="needs to know what the words mean")
@pytest.mark.parametrize("text", UNSOLVED)
def test_what_the_rules_do_not_know(text: str) -> None:
    assert cut(text) == text


def test_every_sentence_mark_of_unicode_cuts() -> None:
    marks = regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x20, 0xD800))))
    assert len(marks) > 70
    for mark in set(marks) - COMMAS:
        pieces = RegexSegmenter().split(f"Она пришла{mark} Он ушёл")
        assert pieces == [f"Она пришла{mark}", " Он ушёл"], hex(ord(mark))


@pytest.mark.parametrize("mark", sorted(COMMAS - {"․"}) + list("፣៖᠂"))
def test_the_commas_of_other_scripts_divide_clauses(mark: str) -> None:
    text = f"kwentokwento kwento{mark}| kwento kwentokwento"
    assert cut(text, "clause") == text
    assert cut(text) == text.replace("|", "")


@pytest.mark.parametrize("preset", ["sentence", "clause"])
def test_marks_that_no_space_follows(preset: str) -> None:
    text = "သူသွားသည်။|သူလာသည်။|ሰላም ነው።|ደህና፧|他走了。|好吗？|यह है।|वह है॥"
    assert cut(text, preset) == text


def test_punkt_cuts_at_the_marks_of_other_scripts() -> None:
    text = "यह एक वाक्य है।| यह दूसरा है।|他走了。”|她没走。| It is so.| We saw."
    assert "|".join(PunktSegmenter().split(text.replace("|", ""))) == text


def test_a_semicolon_asks_only_in_greek() -> None:
    for mark in ";\u037e":
        text = f"Τι ώρα είναι{mark}| Είναι τρεις."
        assert cut(text) == cut(text, "clause") == text
    for text in ("for (i = 0; i < n; i++)", "He came; She left.", "Он пришёл; Она ушла."):
        assert cut(text) == text


@pytest.mark.parametrize("text", ["Τι ώρα είναι;", "သူသွားသည်။", "यह है।", "Er kam.", "Смотри!", "ሰላም ነው።"])
def test_a_sentence_ends_before_an_english_one(text: str) -> None:
    assert cut(f"{text}| The next sentence stands here.") == f"{text}| The next sentence stands here."


@pytest.mark.parametrize("text", ["I met Dr.", "Neem bijv.", "Come fruta, p. ej.", "Он живёт на ул."])
def test_no_sentence_ends_with_an_abbreviation(text: str) -> None:
    assert cut(f"{text} The next sentence stands here.") == f"{text} The next sentence stands here."
